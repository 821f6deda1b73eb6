"""The one-line plug into a Megatron pretraining script: `forward_step = vcrd.megatron.distill(forward_step)`."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

from vcrd.loss.api import CalibratedLoss, validity_calibrated_kl
from vcrd.megatron.colocated_teacher import ColocatedTeacher, TeacherModel
from vcrd.megatron.compatibility import MeanOfStep, check_compatibility
from vcrd.megatron.external_validity import Outside, Verifier
from vcrd.megatron.fused_head import FusedHead
from vcrd.megatron.identity import tokenizer_of
from vcrd.megatron.layout import Layout, unwrap
from vcrd.megatron.loss_mask import LossMask
from vcrd.megatron.metrics import STEP_KEYS, IntervalLog, megatron_globals, with_step_sums
from vcrd.megatron.prefetch import TokensOf
from vcrd.megatron.rank_telemetry import telemetry_of
from vcrd.megatron.remote_teacher import RemoteTeacher
from vcrd.megatron.replay import running_again
from vcrd.megatron.report import Figures, Report
from vcrd.megatron.step_end import StepEnd, raise_if_invalid
from vcrd.megatron.teacher_check import TeacherCheck
from vcrd.settings import DistillSettings


class Observation(NamedTuple):
    """One micro-batch as the loss saw it; `out` and its stats are [s, b], labels and loss_mask [b, s]."""

    number: int
    labels: Tensor
    loss_mask: Tensor
    out: CalibratedLoss


Observer = Callable[[Observation], None]


def distill(
    forward_step: Callable[..., Any],
    settings: DistillSettings | None = None,
    *,
    tokens: TokensOf = "tokens",
    verifier: Verifier | None = None,
    teacher: TeacherModel | None = None,
    tokenizer: Any = None,
) -> Distillation:
    """Turns a script's `forward_step(data_iterator, model, ...)` into one that distils from the linked teacher.

    Positional arguments may come before these two, as Megatron-Bridge's `state` does.

    The script's model, `loss_func`, masks, token counts, schedules and reporting stay as they are: only the
    per-token loss [b, s] that the model computes becomes the validity-calibrated one. Evaluation
    (`model.training` False) stays plain cross-entropy and asks the teacher nothing. Which tokens count is read from the
    `loss_mask` that the model is given, or else from the micro-batch, or from labels below 0 (`LossMask`).

    settings: default `DistillSettings.from_environment()`, the VCRD_* variables.
    tokens: the key of the input tokens [b, s] in what the data iterator yields, or a function that finds them.
    verifier: judges both models' actions, in place of the settings' validity; called as `Outside` says.
    teacher: None for the linked one. Or a frozen Megatron model inside the student's own ranks: this rank's part, the
        list of its chunks where the student interleaves, or a function that returns either and is called at the first
        training step; see `ColocatedTeacher` for what it must have in common with the student and for how to build it.
    tokenizer: that made the data, to be compared with the linked teacher's: Megatron's, Hugging Face's or a
        `vcrd.link.Tokenizer`, the same on every rank. None: that of `megatron.training`, where it runs.

    Every rank calls it; the process group and Megatron's parallel state must exist by the first training step,
    where rank 0 opens the rendezvous and the ranks of the last stage wait for the teacher job. That step raises
    ValueError for what cannot be distilled, and LinkError when the teacher does not come or does not fit.
    """
    settings = DistillSettings.from_environment() if settings is None else settings
    return Distillation(forward_step, settings, tokens, verifier, teacher, tokenizer)


class Distillation:
    """The forward step that `distill` returns: call it, read `report`, `close` it when the run ends.

    report: sums over the tokens of this rank's training micro-batches; see `Report.take`. With `megatron.training`
    it is taken every --log-interval iterations, and written where Megatron writes (`vcrd.megatron.metrics`).
    A run that forgets `close` parts from the teacher when the interpreter ends.
    """

    def __init__(
        self,
        forward_step: Callable[..., Any],
        settings: DistillSettings,
        tokens_of: TokensOf,
        verifier: Verifier | None = None,
        teacher: TeacherModel | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.settings = settings
        self._check = TeacherCheck()
        self._first_step_checked = False
        self.report = Report(self._check)
        self._tokenizer = tokenizer
        self._forward_step = forward_step
        # Whoever looks at the parameters, as Megatron-Bridge does before it passes its state, sees the script's own.
        self.__wrapped__ = forward_step
        linked = teacher is None
        self._teacher = RemoteTeacher(settings, tokens_of) if linked else ColocatedTeacher(settings, teacher)
        self._outside = Outside(settings, tokens_of, verifier)
        self._mask = LossMask(settings, self._outside)
        self._mean = MeanOfStep(settings)
        self._layout: Layout | None = None
        self._attached: Attachment | None = None
        self._fused_head: FusedHead | None = None
        self._done = 0  # micro-batches whose loss was computed
        self._counted = (0.0, 0)  # of the link's seconds waited and bytes received: what a report has already
        self._step_end = StepEnd(self._end_step, self._end_backward)
        # In each micro-batch of the step, where the run is to stop for them.
        self._invalid_rows: list[Tensor] = []
        self._log = IntervalLog(settings, self._teacher)
        self._checked = False  # for clashes, on every rank alike
        self._measuring = False
        self._observer: Observer | None = None
        # Weakly, so that a forgotten plug can be collected; strongly held it would outlive every test.
        atexit.register(_close_if_alive, weakref.ref(self))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, data_iterator, model, args, kwargs = _parted(self._forward_step, args, kwargs)
        forward_step = partial(self._forward_step, *first)
        chunk = unwrap(model)
        if not (chunk.training or self._measuring):
            with self._teacher.evaluation():
                return forward_step(data_iterator, model, *args, **kwargs)
        if not self._checked:
            check_compatibility(chunk, self.settings, linked=isinstance(self._teacher, RemoteTeacher))
            self._checked = True
        if chunk.training:
            self._mean.begin(chunk)
            self._step_end.watch(chunk.config)
            self._watch(chunk)
        self._teacher.host()
        alongside = self._teacher.alongside(chunk)
        if not getattr(chunk, "post_process", True):
            if chunk.training:
                self._log.begin(None)
            with self._timed(chunk), alongside:
                return forward_step(data_iterator, model, *args, **kwargs)
        attachment = self._attach(chunk)
        if chunk.training:
            self._log.begin(self._layout)
        iterator = self._outside.watched(self._teacher.watched(data_iterator))
        before = self._done
        captured = contextlib.nullcontext() if self._fused_head is None else self._fused_head.captured()
        with self._timed(chunk), alongside, attachment.active(), captured:
            result = forward_step(iterator, model, *args, **kwargs)
        if self._done != before + 1:
            raise ValueError(
                f"forward_step: expected one loss from labels given to the model, got {self._done - before}; "
                "vcrd works where the model itself computes its loss per token"
            )
        if megatron_globals() is not None and chunk.training and isinstance(result, tuple):
            sums = {key: self.report.last(field) for key, field in STEP_KEYS.items()}
            result = (*result[:-1], with_step_sums(result[-1], sums))
        return result

    def _timed(self, chunk: torch.nn.Module) -> contextlib.AbstractContextManager:
        return self._log.clock.forward() if chunk.training else contextlib.nullcontext()

    def _end_backward(self) -> None:
        self._log.clock.end_backward()
        if self._fused_head is not None:
            self._fused_head.end_step()

    def _end_step(self) -> None:
        self._log.clock.end_step()
        self._mean.end_step()
        self._teacher.end_step()
        repeated = running_again()
        self.report.end_step(repeated)
        if self.settings.invalid_rows == "stop":
            counts, self._invalid_rows = self._invalid_rows, []
            raise_if_invalid(counts, 0 if self._layout is None else self._layout.data_rank)
        if self._attached is not None and not self._first_step_checked:
            self._first_step_checked = True
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._check.tell("in the first step", group)
        if not repeated:
            self._log.end_step(None if self._attached is None else self.report)

    def record(self, iteration: int, figures: Figures) -> None:
        """For scripts without `megatron.training`: adds figures that this rank took to its records, where
        `telemetry_dir` names a folder, and says in the log what was waited for. Not a collective.
        """
        self._log.record(iteration, figures)

    @contextlib.contextmanager
    def measure(self, observer: Observer | None = None) -> Iterator[Report]:
        """Inside the block evaluation asks the teacher too; its figures go to the report that is yielded.

        observer: called after each micro-batch with everything per token, on the ranks of the last stage.
        Every rank opens the block. Give evaluation an iterator of its own, after training drew all it asked for.
        """
        training, self.report = self.report, Report()
        self._measuring, self._observer = True, observer
        self._teacher.end_step()  # nothing of training is under way
        try:
            with self._teacher.evaluation():
                yield self.report
        finally:
            self.report = training
            self._measuring, self._observer = False, None

    def close(self) -> None:
        """Says goodbye to the teacher, gives the model its own loss and Megatron's iterator its own source back.

        Idempotent; not a collective. Micro-batches that were drawn ahead and not trained on are gone.
        """
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
        self._step_end.undo()
        if self._log.telemetry is not None:
            self._log.telemetry.close()
        self._teacher.close()
        self._outside.check()

    def _watch(self, chunk: torch.nn.Module) -> None:
        if self._log.telemetry is None:
            self._log.telemetry = telemetry_of(chunk, self.settings, "student", self._teacher)

    def _attach(self, chunk: torch.nn.Module) -> Attachment:
        if self._attached is None:
            self._layout = Layout.of(chunk, self.settings)
            self._outside.place(self._layout)
            if self.settings.fused_head != "off":
                self._fused_head = FusedHead(
                    chunk, self._layout.tensor_group, self.settings.fused_head == "recompute"
                )
            self._tokenizer = tokenizer_of(self._tokenizer)
            sizes = (self.settings.vocab_size, self._tokenizer and self._tokenizer.size)
            self._check.place(self._layout, [size for size in sizes if size], self._teacher)
            self._attached = Attachment(chunk, self._loss, self._teacher.given)
        elif self._attached.chunk is not chunk:
            raise ValueError("model: expected the model that was distilled before, got another one")
        if self._layout.tensor_rank == 0 and not self._measuring:
            self.report.per_token_loss = bool(getattr(chunk.config, "calculate_per_token_loss", False))
        self._teacher.connect(self._layout, self._tokenizer)
        return self._attached

    def _loss(self, labels: Tensor, loss_mask: Tensor | None, logits: Tensor) -> Tensor:
        """labels, loss_mask [b, s], logits [s, b, v/tp] -> [b, s]: the loss of the next micro-batch."""
        number = self._done
        self._outside.given = self._attached.given
        loss_mask = self._mask.of(self._layout, labels, loss_mask)
        outside = self._outside.arguments(labels, loss_mask)
        loss_mask = outside.pop("loss_mask", loss_mask)
        answer = self._teacher.answer(number)
        self._done = number + 1
        # Bytes also arrive between two losses: they are counted with the next.
        counted = self._counted
        self._counted = (self._teacher.waited, self._teacher.bytes_received)
        self.report.add_link(self._counted[0] - counted[0], self._counted[1] - counted[1])
        mask = loss_mask.transpose(0, 1)
        calibrated = self._fused_head.loss if self._fused_head else _in_place
        out = calibrated(
            logits,
            answer,
            labels.transpose(0, 1),
            mask=mask,
            vocab_size=self._layout.vocab_size,
            group=self._layout.tensor_group,
            **{**self.settings.loss_arguments(), **outside},
        )
        self.report.add(out, mask)
        if out.loss.requires_grad:
            out.loss.register_hook(partial(self.report.compare, mask))
        if not self._measuring:
            self._check.add(out, mask, labels.transpose(0, 1), answer)
        if self.settings.invalid_rows == "stop" and not self._measuring and self._layout.tensor_rank == 0:
            self._invalid_rows.append(self.report.last("invalid_rows")[0])
        self.report.add_verifier(self._outside.take_seconds())
        if self._observer is not None:
            self._observer(Observation(number, labels, loss_mask, out))
        return out.loss.transpose(0, 1).contiguous()


class Attachment:
    """One model instance with a loss of its own: `loss(labels, loss_mask, logits)`, used while `active`.

    given: while active, the arguments of the model's forward by name, of which `see` is told before it.
    """

    def __init__(
        self,
        chunk: torch.nn.Module,
        loss: Callable[[Tensor, Tensor | None, Tensor], Tensor],
        see: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.chunk = chunk
        self.given: dict[str, Any] = {}
        self._loss = loss
        self._see_arguments = see
        self._plain = chunk.compute_language_model_loss
        self._signature = inspect.signature(chunk.forward)
        self._extra_heads = bool(getattr(chunk.config, "mtp_num_layers", None))
        self._active = False
        self._hook = chunk.register_forward_pre_hook(self._see, with_kwargs=True)
        chunk.compute_language_model_loss = self._compute

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While open, the model's loss is `loss`; otherwise its own."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self.given = {}

    def detach(self) -> None:
        """Leaves the model as it was found."""
        self._hook.remove()
        vars(self.chunk).pop("compute_language_model_loss", None)

    def _see(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._active:
            return
        self.given = self._signature.bind_partial(*args, **kwargs).arguments
        if self._see_arguments is not None:
            self._see_arguments(self.given)

    def _compute(self, labels: Tensor, logits: Tensor) -> Tensor:
        # Multi-token prediction asks first for losses of its own heads, with shifted copies of the labels.
        of_extra_head = self._extra_heads and labels is not self.given.get("labels")
        if not self._active or of_extra_head:
            return self._plain(labels, logits)
        return self._loss(labels, self.given.get("loss_mask"), logits)


def _parted(forward_step: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
    """A call of a forward step: what comes before the data iterator, the iterator, the model, and the rest of both."""
    if kwargs:
        try:
            given = inspect.signature(forward_step).bind(*args, **kwargs)
            args, kwargs = given.args, given.kwargs  # positional wherever they can be
        except ValueError:  # a callable written in C need not have a signature
            pass
    place = next((n for n, value in enumerate(args) if isinstance(value, torch.nn.Module)), 0)
    if not place:
        got = [type(value).__name__ for value in args]
        raise ValueError(
            "forward_step: expected a call with (data_iterator, model, ...) or (state, data_iterator, model, ...), the "
            f"model a torch module, got positional arguments of the types ({', '.join(got)}) and keywords "
            f"({', '.join(kwargs)})"
        )
    return args[: place - 1], args[place - 1], args[place], args[place + 1 :], kwargs


def _in_place(logits: Tensor, *given: Any, **arguments: Any) -> CalibratedLoss:
    # The plug does not know what else the model's own code does with its logits.
    return validity_calibrated_kl(logits, *given, inplace_gradient="if_unused", **arguments)


def _close_if_alive(plug: weakref.ref[Distillation]) -> None:
    alive = plug()
    if alive is not None:
        alive.close()
