from __future__ import annotations

import kernels_under_test
import pytest
import torch

# Emulated CUDA kernels read CPU tensors. Asked for here and not where processes are forked from: a process that has
# looked for a GPU has no working CUDA in its forks.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and not kernels_under_test.EMULATED else ["cpu"]

# About streams and graphs, which nothing but a GPU has.
collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py"]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Where the loss runs; the reference stays on the CPU."""
    kernels_under_test.check()
    from vcrd.loss import ops

    if request.param == "cuda" and not ops._C.with_cuda:
        pytest.skip("vcrd._C was built without CUDA kernels")
    return torch.device(request.param)


@pytest.fixture
def on_device(device):
    """New tensors are made on the device, so that plain torch on the loss's results needs no further word."""
    with device:
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if kernels_under_test.EMULATED:
        left_out = [item for item in items if item.get_closest_marker("cpu_kernels")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
