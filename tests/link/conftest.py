from __future__ import annotations

import pytest
import torch
from listening import forget_threads

# About streams, which nothing but a GPU has.
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda_link.py", "test_cuda_pairs.py"]


@pytest.fixture(autouse=True)
def threads_of_earlier_tests():
    forget_threads()
