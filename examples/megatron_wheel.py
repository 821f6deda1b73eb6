"""What the wheel of megatron-core leaves out of megatron.training."""

from __future__ import annotations

import importlib.util


def keep_compiled_helpers() -> None:
    """The wheel ships its dataset helpers compiled, without the Makefile that Megatron would call at each start."""
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
