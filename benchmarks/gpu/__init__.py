"""Everything that needs a GPU: the queue of `make gpu-check` (check.py), its stages (stages.py) and their scripts.

A script runs as a module, from the checkout: `python -m benchmarks.gpu.parallel`.
"""

import sys
from pathlib import Path

# The modules of benchmarks/ import each other by their own names.
sys.path.append(str(Path(__file__).resolve().parent.parent))
