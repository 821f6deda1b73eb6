"""Validity-calibrated reasoning distillation for Megatron-Core.

The loss needs the compiled extension `vcrd._C` and is loaded on first use. So `vcrd.link` and `vcrd.loss.reference`
work without it, and where the loss is asked for, a missing extension is one clear error.
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_HOME = {
    "vocab_parallel_divergence": "vcrd.loss.divergence",
    "DivergenceStats": "vcrd.loss.divergence",
    "validity_weights": "vcrd.loss.validity",
    "validity_calibrated_kl": "vcrd.loss.api",
    "CalibratedLoss": "vcrd.loss.api",
    "fused_validity_calibrated_kl": "vcrd.loss.fused_head",
    "LossConfig": "vcrd.loss.config",
    "HeadConfig": "vcrd.loss.config",
    "TeacherLogits": "vcrd.teacher_logits",
    "DenseLogits": "vcrd.teacher_logits",
    "TopKLogits": "vcrd.teacher_logits",
    "HiddenStates": "vcrd.teacher_logits",
    "MixedLogits": "vcrd.teacher_logits",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vcrd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
