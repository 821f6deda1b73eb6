"""The plug into a Megatron pretraining script: `forward_step = vcrd.megatron.distill(forward_step)`.

From top to bottom: a script calls `distill`. It returns a `Distillation`, which runs the script's forward step. On
ranks of the last pipeline stage its `StudentLoss` takes over the model's loss (by `hooks.LossHook`), and computes the
loss of each micro-batch in `StudentLoss.compute`, from the model's logits and from what the teacher answers.

The teacher is a `RemoteTeacher`, in a job of its own, or a `ColocatedTeacher`. The link notices the death of a teacher
job, in `StudentLink.receive` (vcrd/link/student.py), which `RemoteTeacher.answer` calls: it waits for a restarted
teacher and asks it again, or raises TeacherLost.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss.api import CalibratedLoss, validity_calibrated_kl
from vcrd.loss.config import LossConfig
from vcrd.megatron.colocated_teacher import ColocatedTeacher, TeacherModel
from vcrd.megatron.compatibility import check_compatibility
from vcrd.megatron.external_validity import ExternalValidity, Verifier
from vcrd.megatron.fused_head import FusedHeadLoss
from vcrd.megatron.hooks import LossHook, StepEndHook
from vcrd.megatron.identity import tokenizer_of
from vcrd.megatron.layout import Layout, unwrap
from vcrd.megatron.loss_mask import LossMask
from vcrd.megatron.metrics import STEP_KEYS, IntervalLog, start_telemetry, with_step_sums
from vcrd.megatron.prefetch import TokensOf, running_again
from vcrd.megatron.privileged import Judged
from vcrd.megatron.remote_teacher import RemoteTeacher
from vcrd.megatron.report import Figures, Report, raise_if_invalid
from vcrd.megatron.teacher_check import TeacherCheck
from vcrd.megatron.teacher_context import without_fields
from vcrd.megatron.teachers import Answer, answer_of
from vcrd.megatron.training_loop import TrainingLoop, bridge_state, signature_for_bridge, training_loop
from vcrd.settings import DistillSettings


class Observation(NamedTuple):
    """One micro-batch as the loss saw it.

    Attributes:
        number: of the micro-batch on this data-parallel rank.
        labels: [b, s].
        loss_mask: [b, s].
        out: what the loss returned, [s, b], also its statistics.
    """

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
    """Turns a script's `forward_step(data_iterator, model, ...)` into one that distills from a teacher.

    Positional arguments may come before these two, such as Megatron-Bridge's `state`. Bridge gives the result its state
    also if it would not give it to the script's own step.

    The script's model, `loss_func`, masks, token counts, schedules and reporting stay as they are: only the
    per-token loss [b, s] that the model computes becomes the validity-calibrated one. Evaluation
    (`model.training` False) stays plain cross-entropy and asks the teacher nothing. The tokens that count are given by
    the `loss_mask` that the model is given, or else by the micro-batch, or by labels below 0 (`LossMask`).

    Args:
        settings: default `DistillSettings.from_environment()`, the VCRD_* variables.
        tokens: the key of the input tokens [b, s] in what the data iterator yields, or a function that finds them.
        verifier: judges both models' actions, in place of the settings' validity; see `ExternalValidity` for its
            arguments.
        teacher: None for a teacher job at the other end of the link, or for its answers in a cache. Or a frozen
            Megatron model in the student's own ranks: this rank's part, the list of its chunks if the student
            interleaves, or a function that returns either and is called at the first training step. `ColocatedTeacher`
            says what it must have in common with the student and how to build it. ValueError beside settings that name
            other teachers.
        tokenizer: the one that made the data, to be compared with the teacher job's: Megatron's, Hugging Face's or a
            `vcrd.link.Tokenizer`, the same on every rank. None: that of `megatron.training` or Megatron-Bridge, if it
            runs.

    Every rank calls it. The process group and the model's groups (`Groups`) must exist by the first training step,
    where rank 0 opens the rendezvous and the ranks of the last stage wait for the teacher job. That step raises
    ValueError if the script or the model cannot be distilled, and LinkError if the teacher job does not come or does
    not fit. ValueError or TypeError at once, on every rank, for settings of which the loss has no meaning.
    """
    settings = DistillSettings.from_environment() if settings is None else settings
    LossConfig(**settings.loss_arguments())  # what the last stage would refuse is refused on every rank
    remote = teacher is None
    source = RemoteTeacher(settings, tokens) if remote else ColocatedTeacher(settings, teacher, tokens)
    loss = StudentLoss(settings, source, ExternalValidity(settings, tokens, verifier), tokenizer)
    return Distillation(forward_step, settings, source, loss)


class Distillation:
    """The forward step that `distill` returns: call it, read `report`, and `close` it when the run ends.

    Attributes:
        report: sums over the tokens of this rank's training micro-batches; see `Report.take`. With `megatron.training`
            and Megatron-Bridge it is taken every log interval and written to their logs (`vcrd.megatron.metrics`).

    If a run does not call `close`, the interpreter does at its end.
    """

    def __init__(
        self,
        forward_step: Callable[..., Any],
        settings: DistillSettings,
        teacher: RemoteTeacher | ColocatedTeacher,
        loss: StudentLoss,
    ) -> None:
        self.settings = settings
        self._forward_step = forward_step
        # Megatron-Bridge reads the parameters of the script's forward step before it passes its state.
        functools.update_wrapper(self, forward_step, updated=())
        self._takes_state_alone = (signature := signature_for_bridge(forward_step)) is not None
        if self._takes_state_alone:
            self.__signature__ = signature
        self._loop: TrainingLoop | None = None
        self._teacher = teacher
        self._loss = loss
        self._log = IntervalLog(settings, teacher)
        self._step_end = StepEndHook(self._end_backward, self._end_step)
        self._checked = False  # whether compatibility was checked
        # A weak reference, so that a plug without users can be collected.
        atexit.register(_close_if_alive, weakref.ref(self))

    @property
    def report(self) -> Report:
        return self._loss.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._loop = training_loop((*args, *kwargs.values()))
        if self._takes_state_alone and bridge_state(args[:1]) is not None:
            args = args[1:]
        before, data_iterator, model, after, kwargs = _split_call(self._forward_step, args, kwargs)

        def run(iterator: Any) -> Any:
            return self._forward_step(*before, iterator, model, *after, **kwargs)

        chunk = unwrap(model)
        if not (chunk.training or self._loss.measuring):
            with self._teacher.evaluation():
                return run(without_fields(data_iterator))
        last_stage = getattr(chunk, "post_process", True)
        self._prepare(chunk, last_stage)
        timed = self._log.clock.forward() if chunk.training else contextlib.nullcontext()
        if not last_stage:
            with timed, self._teacher.alongside(chunk):
                return run(self._teacher.watched_before_last(data_iterator))
        iterator = self._loss.watched(data_iterator)
        with timed, self._teacher.alongside(chunk), self._loss.of_one_micro_batch():
            result = run(iterator)
        if self._loop is not None and chunk.training and isinstance(result, tuple):
            result = (*result[:-1], with_step_sums(result[-1], self._step_sums))
        return result

    def _step_sums(self) -> dict[str, torch.Tensor]:
        return {key: self.report.last(field) for key, field in STEP_KEYS.items()}

    def _prepare(self, chunk: torch.nn.Module, last_stage: bool) -> None:
        """Before each micro-batch. With the first ones: checks, hooks, telemetry, and the teacher job's arrival."""
        if not self._checked:
            arguments = None if self._loop is None else self._loop.arguments
            remote = isinstance(self._teacher, RemoteTeacher)
            check_compatibility(chunk, arguments, remote)
            self._checked = True
        if chunk.training:
            self._step_end.watch(chunk.config)
            if self._log.telemetry is None:
                self._log.telemetry = start_telemetry(chunk, self.settings, "student", self._teacher)
        self._teacher.host()
        if last_stage:
            self._loss.attach(chunk, self._loop)
        if chunk.training:
            self._log.begin(self._loss.layout if last_stage else None)

    def _end_backward(self) -> None:
        self._log.clock.end_backward()
        self._loss.end_backward()

    def _end_step(self) -> None:
        self._log.clock.end_step()
        self._teacher.end_step()
        repeated = running_again()
        self._loss.end_step(repeated)
        if not repeated:
            self._log.end_step(self.report if self._loss.attached else None, self._loop)

    def record(self, iteration: int, figures: Figures) -> None:
        """For scripts with a training loop of their own: adds figures that this rank took to its records, if
        `telemetry_dir` names a folder, and writes to the log what the rank waited for. Not a collective.
        """
        self._log.record(iteration, figures)

    @contextlib.contextmanager
    def measure(self, observer: Observer | None = None) -> Iterator[Report]:
        """Inside the block evaluation asks the teacher too; its figures go to the yielded report.

        Args:
            observer: called after each micro-batch with everything per token, on the ranks of the last stage.

        Every rank opens the block. Give evaluation an iterator of its own, after training drew all it asked for.
        """
        self._teacher.end_step()  # no training step is in progress
        with self._loss.measured(observer) as report, self._teacher.evaluation():
            yield report

    def close(self) -> None:
        """Ends the link, and gives the model its own loss and Megatron's iterator its own source back.

        Idempotent; not a collective. Micro-batches that were drawn ahead and not trained on are lost.
        """
        self._loss.detach()
        self._step_end.undo()
        if self._log.telemetry is not None:
            self._log.telemetry.close()
        self._teacher.close()
        self._loss.external.check()


class StudentLoss:
    """The loss of each micro-batch, on ranks of the last pipeline stage. Other ranks have one that is never attached.

    layout: this rank's place, None before `attach`. measuring: whether evaluation asks the teacher too.
    """

    def __init__(
        self,
        settings: DistillSettings,
        teacher: RemoteTeacher | ColocatedTeacher,
        external: ExternalValidity,
        tokenizer: Any,
    ) -> None:
        self.external = external
        self.layout: Layout | None = None
        self._config: LossConfig | None = None
        self.measuring = False
        self._settings = settings
        self._teacher = teacher
        self._tokenizer = tokenizer
        # The teachers of a mixture answer together: its figures are those of one teacher without a name.
        names = ("",) if settings.mixture() else teacher.names
        self._names = () if names == ("",) else names
        self._checks = [TeacherCheck(number, name) for number, name in enumerate(names)]
        self.report = Report(self._checks, self._names)
        self._weights: Tensor | None = None  # of the teachers, on the device, if any is not 1
        self._mask = LossMask(settings, external)
        self._hook: LossHook | None = None
        self._fused_head: FusedHeadLoss | None = None
        self._observer: Observer | None = None
        self._done = 0  # micro-batches whose loss was computed
        self._reported = teacher.each()  # what is in the report already
        self._invalid_rows: list[Tensor] = []  # of each micro-batch of the step, with invalid_rows "stop"
        self._first_step_checked = False

    @property
    def attached(self) -> bool:
        return self._hook is not None

    def attach(self, chunk: torch.nn.Module, loop: TrainingLoop | None) -> None:
        """Takes over the loss of the model, with the first micro-batch, and waits for the teacher job."""
        if self._hook is None:
            self.layout = Layout.of(chunk, self._settings)
            self._config = LossConfig(
                vocab_size=self.layout.vocab_size,
                inplace_gradient="if_unused",  # the model's own code may do something else with its logits
                weight_group=self.layout.weight_group,
                **self._settings.loss_arguments(),
            )
            self.external.place(self.layout)
            if self._settings.fused_head != "off":
                self._fused_head = FusedHeadLoss(
                    chunk, self.layout.tensor_group, self._settings.fused_head == "recompute"
                )
            self._tokenizer = tokenizer_of(self._tokenizer, loop)
            sizes = (self._settings.vocab_size, self._tokenizer and self._tokenizer.size)
            for check in self._checks:
                check.place(self.layout, [size for size in sizes if size], self._teacher)
            weights = [self._settings.weight_of(name) for name in self._names]
            if any(weight != 1 for weight in weights):
                self._weights = torch.tensor(weights, device=self.layout.device)
            capture = self._fused_head.captured if self._fused_head else contextlib.nullcontext
            self._hook = LossHook(chunk, self.compute, self._teacher.given, capture)
        elif self._hook.chunk is not chunk:
            raise expected("model", "the model that was distilled before", "another one")
        if self.layout.tensor_rank == 0 and not self.measuring:
            self.report.per_token_loss = bool(getattr(chunk.config, "calculate_per_token_loss", False))
        self._teacher.connect(self.layout, self._tokenizer)

    def watched(self, data_iterator: Any) -> Any:
        """The iterator for the script to draw this micro-batch from."""
        return self.external.watched(self._teacher.watched(data_iterator))

    @contextlib.contextmanager
    def of_one_micro_batch(self) -> Iterator[None]:
        """Around the script's forward step: the model's loss is `compute`. ValueError unless it was computed once."""
        before = self._done
        with self._hook.active():
            yield
        losses = self._done + self._hook.planned - before
        if losses != 1:
            raise expected(
                "forward_step",
                "one loss from labels given to the model",
                f"{losses}; vcrd works where the model itself computes its loss per token",
            )

    def compute(self, labels: Tensor, loss_mask: Tensor | None, logits: Tensor) -> Tensor:
        """labels, loss_mask [b, s], logits [s, b, v/tp] -> [b, s]: the loss of the next micro-batch."""
        number = self._done
        self.external.given = self._hook.given
        loss_mask = self._mask.of(self.layout, labels, loss_mask)
        external = self.external.arguments(labels, loss_mask)
        loss_mask = external.pop("loss_mask", loss_mask)
        answer = self._teacher.answer(number)
        if isinstance(answer, Judged):
            answer, judge = answer
            external["judge"] = answer_of(judge)
        answer = answer_of(answer)
        self._done = number + 1
        mask = given = loss_mask.transpose(0, 1)
        weights = None
        if self._weights is not None:
            weights = self._weights[0 if answer.owners is None else answer.owners.long()]
        calibrated = validity_calibrated_kl
        if self._fused_head:
            calibrated = self._fused_head.loss
            if weights is not None:  # its values tell the head which upstream gradient to expect
                given = mask * weights
        out = answer.loss(
            calibrated,
            logits,
            labels.transpose(0, 1),
            config=self._config,
            mask=given,
            group=self.layout.tensor_group,
            **external,
        )
        if weights is not None:
            out = out._replace(loss=out.loss * weights)
        self._count(out, mask, labels.transpose(0, 1), answer)
        if self._observer is not None:
            self._observer(Observation(number, labels, loss_mask, out))
        return out.loss.transpose(0, 1).contiguous()

    def _count(self, out: CalibratedLoss, mask: Tensor, labels: Tensor, answer: Answer) -> None:
        """Adds one micro-batch, all of it [s, b], to the report and to the checks of the teachers."""
        # Bytes also arrive between two losses: they are counted with the later one.
        before, self._reported = self._reported, self._teacher.each()
        for teacher, (now, then) in enumerate(zip(self._reported, before, strict=True)):
            waited = now.waits.seconds - then.waits.seconds
            self.report.add_link(waited, now.received - then.received, teacher if self._names else 0)
        self.report.add(out, mask, answer.owners)
        if out.loss.requires_grad:
            out.loss.register_hook(partial(self.report.compare, mask))
        if not self.measuring:
            for part in answer.parts:
                for teacher in part.teachers:
                    here = answer.tokens_of(teacher)
                    own = mask if here is None else torch.where(here, mask, torch.zeros_like(mask))
                    self._checks[teacher].add(out, own, labels, part.logits)
        if self._settings.invalid_rows == "stop" and not self.measuring and self.layout.tensor_rank == 0:
            self._invalid_rows.append(self.report.last("invalid_rows")[0])
        self.report.add_verifier(self.external.take_seconds())

    def end_backward(self) -> None:
        """After the last backward of a training step."""
        if self._fused_head is not None:
            self._fused_head.end_step()

    def end_step(self, repeated: bool) -> None:
        """At the end of a training step, on every rank. repeated: Megatron ran the step a second time, to compare."""
        self.report.end_step(repeated)
        if self._settings.invalid_rows == "stop":
            counts, self._invalid_rows = self._invalid_rows, []
            raise_if_invalid(counts, 0 if self.layout is None else self.layout.data_rank)
        if self.attached and not self._first_step_checked:
            self._first_step_checked = True
            for check in self._checks:
                check.tell("in the first step", self.layout.groups.data_context)

    @contextlib.contextmanager
    def measured(self, observer: Observer | None) -> Iterator[Report]:
        """While open, micro-batches are counted in the yielded report, and not in that of training."""
        training, self.report = self.report, Report(names=self._names)
        self.measuring, self._observer = True, observer
        try:
            yield self.report
        finally:
            self.report = training
            self.measuring, self._observer = False, None

    def detach(self) -> None:
        """Gives the model its own loss back. Idempotent."""
        if self._hook is not None:
            self._hook.undo()
            self._hook = None


def _split_call(forward_step: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
    """A call of a forward step: what precedes the data iterator, the iterator, the model, what follows, keywords."""
    if kwargs:
        try:
            given = inspect.signature(forward_step).bind(*args, **kwargs)
            args, kwargs = given.args, given.kwargs  # positional if possible
        except ValueError:  # a callable written in C may have no signature
            pass
    place = next((n for n, value in enumerate(args) if isinstance(value, torch.nn.Module)), 0)
    if not place:
        got = [type(value).__name__ for value in args]
        raise expected(
            "forward_step",
            (
                "a call with (data_iterator, model, ...) or (state, data_iterator, model, ...), the model a "
                "torch module"
            ),
            f"positional arguments of the types ({', '.join(got)}) and keywords ({', '.join(kwargs)})",
        )
    return args[: place - 1], args[place - 1], args[place], args[place + 1 :], kwargs


def _close_if_alive(plug: weakref.ref[Distillation]) -> None:
    alive = plug()
    if alive is not None:
        alive.close()
