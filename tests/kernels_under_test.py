"""Selects the compiled kernels for the tests: those of vcrd._C, or of a module that replaces it.

VCRD_TEST_MODULE names such a module. tests/cuda_emulation sets it to run the same tests on the source of the CUDA
kernels without a GPU. Import this before anything that imports vcrd's operators, in every process.
"""

from __future__ import annotations

import importlib.util
import os
import sys

PATH = os.environ.get("VCRD_TEST_MODULE")
EMULATED = PATH is not None


def _stand_in() -> None:
    name = "vcrd._C"
    if not EMULATED or name in sys.modules:
        return
    import torch  # noqa: F401  the module needs its libraries

    specification = importlib.util.spec_from_file_location(name, PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.modules[name] = module


_stand_in()


def check() -> None:
    """Checks that no process tests the wrong kernels unnoticed."""
    from vcrd.loss import ops

    assert not EMULATED or ops._C.__file__ == PATH, f"{ops._C.__file__} is tested instead of {PATH}"
