"""A teacher whose layers multiply in FP8: what its recipe and its micro-batches must be."""

from __future__ import annotations

from typing import Any


def refuse_delayed_scaling(config: Any) -> None:
    """ValueError for a teacher's configuration with the recipe "delayed".

    Transformer Engine (2.20.0.dev0, `FP8GlobalStateManager.autocast_exit`) renews the scales of delayed scaling at the
    end of a forward that records a graph, and in backward. A teacher has neither: served, its scales would stay where
    the checkpoint left them, at 1 if it was trained in bfloat16; in the student's ranks they would be renewed at the
    student's forward, and would not be saved, so that a resumed run gave another curve.
    """
    # Up to 0.16 and later alike: a string, or an enumeration that is a string.
    if getattr(config, "fp8", None) and getattr(config, "fp8_recipe", None) == "delayed":
        raise ValueError(
            "fp8_recipe: expected 'tensorwise', 'blockwise' or 'mxfp8' for a teacher, got 'delayed', whose scales are "
            "renewed in training alone"
        )


def refuse_other_output_layer(config: Any, argument: str) -> None:
    """ValueError, naming `argument`, for a model that multiplies by its output layer's weight in MXFP8."""
    if getattr(config, "fp8_output_proj", False):
        raise ValueError(
            f"{argument}: expected fp8_output_proj False, for the product with the output layer is taken in the "
            "model's own dtype, got True"
        )


def refuse_uneven_tokens(config: Any, batch: int, sequence: int) -> None:
    """ValueError, before any collective, for tokens [batch, sequence] that a product in FP8 does not take.

    Multiples of 8 rows on each rank, of a whole block of 32 with MXFP8 (Transformer Engine 2.20.0.dev0,
    `assert_dim_for_fp8_exec` and its MXFP8 quantizer).
    """
    if not getattr(config, "fp8", None):
        return
    multiple = 32 if getattr(config, "fp8_recipe", None) == "mxfp8" else 8
    parts = config.tensor_model_parallel_size if getattr(config, "sequence_parallel", False) else 1
    if batch * sequence % (multiple * parts):
        raise ValueError(
            f"tokens: expected micro-batches of a multiple of {multiple * parts} tokens, for the teacher's layers "
            f"multiply in FP8 (recipe {config.fp8_recipe!s}), got [{batch}, {sequence}]"
        )
