"""A teacher's heads of multi-token prediction: they predict what no student is taught here, so they do not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class ExtraHeads:
    """The heads of multi-token prediction in one chunk of a model, of which there may be none."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        modules = list(chunk.modules())
        self._blocks = [m for m in modules if type(m).__name__ == "MultiTokenPredictionBlock"]
        # Many modules share a configuration.
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        self._configs = [c for c in configs.values() if getattr(c, "mtp_num_layers", None)]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """While open, a forward of the model computes its main head alone, with or without labels.

        Each stage of a pipeline must do so: hidden states of extra heads are then not sent either.
        """
        counts = [config.mtp_num_layers for config in self._configs]
        for block in self._blocks:
            block.forward = _pass_on
        for config in self._configs:
            config.mtp_num_layers = None
        try:
            yield
        finally:
            for config, count in zip(self._configs, counts, strict=True):
                config.mtp_num_layers = count
            for block in self._blocks:
                del block.forward


def _pass_on(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    return hidden_states
