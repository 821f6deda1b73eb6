"""Validity-calibrated reasoning distillation for Megatron-Core.

The loss needs the compiled extension `vcrd._C` and is loaded on first use, so that `vcrd.link` and `vcrd.reference`
work, and an absent extension is one clear error, exactly where the loss is asked for.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "vocab_parallel_divergence": "vcrd.divergence",
    "DivergenceStats": "vcrd.divergence",
    "validity_weights": "vcrd.validity",
    "validity_calibrated_kl": "vcrd.loss",
    "CalibratedLoss": "vcrd.loss",
    "fused_validity_calibrated_kl": "vcrd.head",
    "TopKLogits": "vcrd.teacher_forms",
    "HiddenStates": "vcrd.teacher_forms",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vcrd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
