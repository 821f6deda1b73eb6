"""Property tests state what is true, not how fast: a busy machine must not fail them."""

import sys
from pathlib import Path

from hypothesis import settings

# At the end: a folder of tests must not come before the package of the same name.
sys.path.append(str(Path(__file__).parents[1]))

settings.register_profile("link", deadline=None)
settings.load_profile("link")
