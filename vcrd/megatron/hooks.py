"""Where the plug hooks into Megatron's objects: the model's loss, the end of a step, multi-token prediction.

Each hook can be undone, and leaves the objects as they were found.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def takes_output_processor(chunk: torch.nn.Module) -> bool:
    """Whether the model's forward takes a function that computes its output from the last hidden states.

    `GPTModel` does from Megatron-Core 0.19 on; `HybridModel` does not. A forward that someone has wrapped counts as one
    that does not, since the wrapper may not pass the argument on.
    """
    return "output_processor" in inspect.signature(chunk.forward, follow_wrapped=False).parameters


class LossHook:
    """Takes over the loss of one model: `loss(labels, loss_mask, logits)` replaces its own while `active`.

    labels, loss_mask: [b, s], the mask None if the model is given none. logits: [s, b, v/tp]. It returns [b, s].

    A model whose forward takes an `output_processor` (`GPTModel` from Megatron-Core 0.19 on) is given one. In any other
    `compute_language_model_loss` is replaced. Both ways give the same bits.

    With overlap_moe_expert_parallel_comm the script's forward step only builds a plan of the forward, which Megatron
    carries out after the step has returned and before the next one. The plan is given the `output_processor`.

    see: called before the model's forward with its arguments by name. given: these arguments, while active and while
    the loss is computed. capture: open around the call of the output layer, for a head that multiplies by itself; in a
    model without `output_processor` while active.
    """

    def __init__(
        self,
        chunk: torch.nn.Module,
        loss: Loss,
        see: Callable[[dict[str, Any]], None] | None = None,
        capture: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.chunk = chunk
        self.given: dict[str, Any] = {}
        self.planned = (
            0  # losses that plans will compute, of those that were built since the last `active` began
        )
        self._loss = loss
        self._see = see
        self._capture = capture
        self._active = False
        self._signature = inspect.signature(chunk.forward)
        self._by_processor = takes_output_processor(chunk)
        self._hook = chunk.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._replaced = (
            {} if self._by_processor else {"compute_language_model_loss": self._in_place_of_plain}
        )
        if self._by_processor and getattr(chunk.config, "overlap_moe_expert_parallel_comm", False):
            # Not a call of the module, so there is no hook for it.
            self._replaced = {"build_schedule_plan": self._build_plan}
            self._plan_signature = inspect.signature(chunk.build_schedule_plan)
        self._plain = {name: getattr(chunk, name) for name in self._replaced}
        self._has_extra_heads = bool(getattr(chunk.config, "mtp_num_layers", None))
        for name, ours in self._replaced.items():
            setattr(chunk, name, ours)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While open, the model's loss is `loss`; otherwise its own."""
        self._active, self.planned = True, 0
        try:
            with contextlib.nullcontext() if self._by_processor else self._capture():
                yield
        finally:
            self._active = False
            self.given = {}

    def undo(self) -> None:
        self._hook.remove()
        for name in self._replaced:
            delattr(self.chunk, name)

    def _before_forward(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not self._active:
            return None
        return args, self._with_processor(self._signature.bind_partial(*args, **kwargs).arguments, kwargs)

    def _build_plan(self, *args: Any, **kwargs: Any) -> Any:
        if self._active:
            given = self._plan_signature.bind_partial(*args, **kwargs).arguments
            kwargs = self._with_processor(given, kwargs)
            self.planned += "output_processor" in kwargs
        return self._plain["build_schedule_plan"](*args, **kwargs)

    def _with_processor(self, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call of the model with an `output_processor`. given: all its arguments by name."""
        self.given = given
        if self._see is not None:
            self._see(given)
        if not self._by_processor or given.get("labels") is None:
            return kwargs
        process = kwargs.get("output_processor") or _own_way
        return {**kwargs, "output_processor": partial(self._process, given, process)}

    def _process(self, given: dict[str, Any], process: Callable[..., Tensor], **passed: Any) -> Tensor:
        """An `output_processor`: that of the script or `_own_way`, with our loss in place of the model's own."""
        before, self.given = self.given, given
        try:
            with self._capture():
                return process(**{**passed, "compute_language_model_loss": self._compute})
        finally:
            self.given = before

    def _in_place_of_plain(self, labels: Tensor, logits: Tensor) -> Tensor:
        # Multi-token prediction calls this first for its own heads, with shifted copies of the labels.
        of_extra_head = self._has_extra_heads and labels is not self.given.get("labels")
        return (
            self._compute(labels, logits)
            if self._active and not of_extra_head
            else self._plain["compute_language_model_loss"](labels, logits)
        )

    def _compute(self, labels: Tensor, logits: Tensor) -> Tensor:
        return self._loss(labels, self.given.get("loss_mask"), logits)


def _own_way(
    *,
    hidden_states: Tensor,
    output_layer: torch.nn.Module,
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    scale_logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """What `GPTModel` does after its last layer."""
    logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output)
    return compute_language_model_loss(labels, scale_logits(logits))


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

        # Megatron-Bridge writes the names of functions into its checkpoints, and imports them by name.
        @wraps(plain.func if isinstance(plain, partial) else plain)
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
