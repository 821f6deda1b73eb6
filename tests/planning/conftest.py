"""Property tests state what is true, not how fast: a busy machine must not fail them."""

import sys
from pathlib import Path

from hypothesis import settings

# At the end: a folder of tests must not come before the package of the same name.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "link")]

settings.register_profile("planning", deadline=None)
settings.load_profile("planning")
