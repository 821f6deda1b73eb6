"""Checks and fixes for megatron.training from a wheel of megatron-core."""

from __future__ import annotations

import importlib.util


def require_training() -> None:
    """SystemExit with a message if this megatron-core has no megatron.training."""
    try:
        found = importlib.util.find_spec("megatron.training")
    except ModuleNotFoundError:  # not even megatron
        found = None
    if found is None:
        raise SystemExit(
            "megatron.training is missing: it comes with megatron-core 0.19, which needs Python 3.12, and with a "
            "checkout of Megatron-LM"
        )


def keep_compiled_helpers() -> None:
    """Skips the Makefile that Megatron calls at each start: the wheel has the compiled helpers without it."""
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
