"""The modules of benchmarks/quality import each other as they do when they run."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "quality"))

collect_ignore = [] if torch.cuda.is_available() else ["test_device.py"]
