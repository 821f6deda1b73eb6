from __future__ import annotations

import sys
from pathlib import Path

# At the end: a folder of tests must not come before the package of the same name.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "link")]
sys.path += [str(Path(__file__).parents[1] / "megatron"), str(Path(__file__).parents[2])]
