"""What needs a GPU is collected only where there is one."""

from __future__ import annotations

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_device.py"]
