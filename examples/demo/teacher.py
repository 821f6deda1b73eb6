"""The teacher job: the full SmolLM2 over its pipeline stages."""

from __future__ import annotations

from pathlib import Path

from vcrd.megatron import serve

from .convert import load
from .model import Shape, build, configure, in_its_dtype
from .settings import DemoSettings
from .source import tokenizer, weights


def run(settings: DemoSettings) -> None:
    """Loads this rank's stage and serves it until the student has left."""
    cache = Path(settings.cache)
    shape = Shape.load(cache / "shape.json")
    model = build(shape, configure(shape, shape.layers, settings.dtype), settings.sequence_length)
    with weights(cache) as fetch:
        load(model, fetch, shape, range(shape.layers))
    serve(
        in_its_dtype(model).requires_grad_(False),
        settings.distill(),
        tokenizer=tokenizer(cache),
        checkpoint="SmolLM2-135M-Instruct",
    )
