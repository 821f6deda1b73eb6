"""Faults are planted one at a time; what they are planted in is in helpers of this folder."""

import sys
from pathlib import Path

# At the end: a folder of tests must not come before the package of the same name.
sys.path += [str(Path(__file__).parents[1])]
