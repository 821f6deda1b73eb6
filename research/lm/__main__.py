"""`python research/lm`: see compare.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parents[2]))

from lm.compare import main  # noqa: E402

sys.exit(main())
