import sys
from pathlib import Path

# At the end: a folder of tests must not come before the package of the same name.
sys.path.append(str(Path(__file__).parents[1]))
