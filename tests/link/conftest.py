"""Property tests state what is true, not how fast: a busy machine must not fail them."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from listening import forget_threads

# At the end: a folder of tests must not come before the package of the same name.
sys.path.append(str(Path(__file__).parents[1]))

# About streams, which nothing but a GPU has.
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda_link.py", "test_cuda_pairs.py"]

settings.register_profile("link", deadline=None)
settings.load_profile("link")


@pytest.fixture(autouse=True)
def threads_of_earlier_tests():
    forget_threads()
