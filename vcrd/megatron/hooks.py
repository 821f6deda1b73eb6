"""Where the plug hooks into Megatron's objects: the model's loss, the end of a step, multi-token prediction.

Each hook can be undone, and leaves the objects as they were found.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vcrd.megatron.output_layer import takes_output_processor

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]


class LossHook:
    """Takes over the loss of one model: `loss(labels, loss_mask, logits)` replaces its own while `active`.

    labels, loss_mask: [b, s], the mask None if the model is given none. logits: [s, b, v/tp]. It returns [b, s].

    A model whose forward takes an `output_processor` (`GPTModel` from Megatron-Core 0.19 on) is given one. In any other
    `compute_language_model_loss` is replaced. Both ways give the same bits.

    see: called before the model's forward with its arguments by name. given: these arguments, while active.
    """

    def __init__(
        self,
        chunk: torch.nn.Module,
        loss: Loss,
        see: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.chunk = chunk
        self.given: dict[str, Any] = {}
        self._loss = loss
        self._see = see
        self._active = False
        self._signature = inspect.signature(chunk.forward)
        self._by_processor = takes_output_processor(chunk)
        self._hook = chunk.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        if not self._by_processor:
            self._plain = chunk.compute_language_model_loss
            self._has_extra_heads = bool(getattr(chunk.config, "mtp_num_layers", None))
            chunk.compute_language_model_loss = self._in_place_of_plain

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While open, the model's loss is `loss`; otherwise its own."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self.given = {}

    def undo(self) -> None:
        self._hook.remove()
        if not self._by_processor:
            del self.chunk.compute_language_model_loss

    def _before_forward(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not self._active:
            return None
        self.given = self._signature.bind_partial(*args, **kwargs).arguments
        if self._see is not None:
            self._see(self.given)
        if not self._by_processor or self.given.get("labels") is None:
            return None
        scripts_own = kwargs.get("output_processor")
        processor = self._process if scripts_own is None else partial(self._process_by, scripts_own)
        return args, {**kwargs, "output_processor": processor}

    def _process(
        self, *, hidden_states, output_layer, output_weight, runtime_gather_output, scale_logits, labels, **_
    ) -> Tensor:
        """An `output_processor`: what `GPTModel` does after its last layer, with our loss in place of its own."""
        logits, _ = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return self._compute(labels, scale_logits(logits))

    def _process_by(self, scripts_own: Callable[..., Tensor], **given: Any) -> Tensor:
        return scripts_own(**{**given, "compute_language_model_loss": self._compute})

    def _in_place_of_plain(self, labels: Tensor, logits: Tensor) -> Tensor:
        # Multi-token prediction calls this first for its own heads, with shifted copies of the labels.
        of_extra_head = self._has_extra_heads and labels is not self.given.get("labels")
        return (
            self._compute(labels, logits)
            if self._active and not of_extra_head
            else self._plain(labels, logits)
        )

    def _compute(self, labels: Tensor, logits: Tensor) -> Tensor:
        return self._loss(labels, self.given.get("loss_mask"), logits)


class StepEndHook:
    """Runs functions at the end of each training step, on every rank: the gradients are then final.

    Megatron's schedules then call `config.finalize_model_grads_func`; the optimizer runs later. `before` runs before
    that function, when each rank still has the gradients of its own micro-batches, and `after` runs after it.
    """

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before, self._after = before, after
        self._watched: list[
            tuple[Any, Any, Any]
        ] = []  # a configuration, its own function, and the replacement

    def watch(self, config: Any) -> None:
        """Once per configuration. Megatron reads the first of those that an interleaved pipeline's chunks have."""
        if any(seen is config for seen, _, _ in self._watched):
            return
        plain = config.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            self._before()
            if plain is not None:
                plain(*args, **kwargs)
            self._after()

        self._watched.append((config, plain, finalize))
        config.finalize_model_grads_func = finalize

    def undo(self) -> None:
        """Restores the configurations, except those that someone else has changed since."""
        for config, plain, finalize in self._watched:
            if config.finalize_model_grads_func is finalize:
                config.finalize_model_grads_func = plain
        self._watched.clear()


class ExtraHeads:
    """The heads of multi-token prediction in one chunk of a teacher, if there are any. No student is taught by them."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        modules = list(chunk.modules())
        self._blocks = [m for m in modules if type(m).__name__ == "MultiTokenPredictionBlock"]
        # Many modules share a configuration.
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        self._configs = [c for c in configs.values() if getattr(c, "mtp_num_layers", None)]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """While open, a forward of the model computes its main head alone, with or without labels.

        Each stage of a pipeline must open it, for then no stage sends hidden states of extra heads either.
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


def _pass_on(*, hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states
