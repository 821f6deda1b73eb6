"""Distillation inside Megatron-Core: `distill` for the student's script, `serve` for the teacher's."""

from __future__ import annotations

import importlib

_HOME = {
    "distill": "vcrd.megatron.distillation",
    "Distillation": "vcrd.megatron.distillation",
    "Observation": "vcrd.megatron.distillation",
    "DistillSettings": "vcrd.settings",
    "Figures": "vcrd.megatron.report",
    "Report": "vcrd.megatron.report",
    "fill_cache": "vcrd.megatron.filling",
    "fill_cache_by_link": "vcrd.megatron.filling",
    "serve": "vcrd.megatron.serving",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    # Lazily: vcrd.megatron.cpu must be able to hide packages before anything of Megatron is imported.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vcrd.megatron' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
