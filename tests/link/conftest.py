from __future__ import annotations

import link_jobs
import pytest
import torch
from listening import forget_threads

from vcrd.link import LinkSettings
from vcrd.link.transport import fake, nccl


def has_nccl() -> bool:
    try:
        return torch.cuda.is_available() and bool(nccl.version())
    except ImportError:
        return False


# About streams, which nothing but a GPU has.
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda_link.py"]


@pytest.fixture(autouse=True)
def threads_of_earlier_tests():
    forget_threads()


@pytest.fixture(autouse=True)
def rules_of_nccl():
    """No test breaks one without saying so (`fake.broken.clear()`); processes that it starts look for themselves."""
    yield
    broken, fake.broken[:] = list(fake.broken), []
    assert not broken


NCCL = ["nccl"] if has_nccl() else []


@pytest.fixture(params=["tcp", "fake", *NCCL])
def each_transport(request, monkeypatch):
    """Runs a test once for each transport, by making it the default of the settings; with NCCL on a GPU."""
    return _by_default(request.param, monkeypatch)


@pytest.fixture(params=["tcp", pytest.param("fake", marks=pytest.mark.slow), *NCCL])
def each_transport_at_leisure(request, monkeypatch):
    """The same, with the fast tier over TCP only."""
    return _by_default(request.param, monkeypatch)


# NCCL refuses two ranks of one process on one GPU, so tests with both ends in one process run over the others.
@pytest.fixture(params=["tcp", "fake"])
def each_transport_in_one_process(request, monkeypatch):
    return _by_default(request.param, monkeypatch)


@pytest.fixture(params=["tcp", pytest.param("fake", marks=pytest.mark.slow)])
def each_transport_in_one_process_at_leisure(request, monkeypatch):
    return _by_default(request.param, monkeypatch)


def _by_default(transport: str, monkeypatch) -> str:
    default = list(LinkSettings.__init__.__defaults__)
    default[default.index("auto")] = transport
    monkeypatch.setattr(LinkSettings.__init__, "__defaults__", tuple(default))
    if transport == "nccl":
        monkeypatch.setenv(link_jobs.DEVICE, "cuda:0")
    return transport
