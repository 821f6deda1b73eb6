"""What the wheels of megatron-core leave out of megatron.training."""

from __future__ import annotations

import importlib.util


def require_training() -> None:
    """SystemExit of one sentence where this megatron-core has no megatron.training."""
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
    """The wheel ships its dataset helpers compiled, without the Makefile that Megatron would call at each start."""
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
