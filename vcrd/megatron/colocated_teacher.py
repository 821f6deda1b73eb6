"""A frozen teacher in the student's ranks: each pipeline stage runs the teacher's part before the student's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vcrd.errors import expected, wrong_type
from vcrd.link.handshake import MOST_TOKENS, Tokenizer
from vcrd.link.question import Question, check_context
from vcrd.link.requests import Request
from vcrd.link.student import Waits
from vcrd.megatron.compatibility import refuse_delayed_scaling, refuse_uneven_tokens
from vcrd.megatron.hooks import ExtraHeads
from vcrd.megatron.layout import Layout, plain_copy, unwrap
from vcrd.megatron.output_layer import Captured, OutputLayer
from vcrd.megatron.packing import Doubts, PackedInputs, by_engine, field, look_for_borders
from vcrd.megatron.prefetch import TokensOf, question_of
from vcrd.megatron.privileged import Judged, no_context
from vcrd.megatron.routing import TEACHER_KEY
from vcrd.megatron.teacher_context import (
    CONTEXT_KEYS,
    SplitRows,
    TeacherRows,
    columns_of,
    for_students_alone,
    recorded,
    row_multiple,
    without_fields,
)
from vcrd.megatron.teachers import Counters
from vcrd.settings import DistillSettings, label, teachers_in
from vcrd.teacher_logits import DenseLogits, HiddenStates, TeacherLogits, factor_of

TeacherModel = nn.Module | list[nn.Module] | Callable[[], nn.Module | list[nn.Module]]

_PAYLOADS = ("hidden", "float16", "float32")
# Must be equal in both configurations, so that stages and shards of the vocabulary match.
_EQUAL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
)
# Arguments of the student's forward that the teacher is not given: with labels it would return a loss.
_STUDENTS_OWN = ("labels", "loss_mask", "output_processor", "output_processor_context")
_VISIBILITY = ("packed_seq_params", "packing_kwargs", "attention_mask")


class ColocatedTeacher:
    """Takes the place of `RemoteTeacher`: `alongside` each forward step on every rank, `answer` on the last stage.

    The teacher has the student's tensor, pipeline and context parallelism and its interleaving, and with tensor
    parallelism also its padded vocabulary. Its layers, heads and hidden size may differ. It is given the arguments that
    the script gives the student's forward, without labels and loss mask. It runs in eval mode without a graph, and is
    part neither of the student's parameters nor of its checkpoints.

    Between pipeline stages the teacher's hidden states travel beside the student's, in one tensor
    [s, b, student's hidden size + teacher's hidden size] of one dtype. Megatron sends it like any other if the
    student's configuration has `variable_seq_lengths`; nothing in Megatron is changed. The gradient of the teacher's
    columns is zero. The model provider that builds both sets `variable_seq_lengths` at its end, because Megatron's
    arguments cannot, and its constructor refuses it together with the token dispatcher "allgather":

        def model_provider(pre_process=True, post_process=True, vp_stage=None, **rest):
            student = build(student_config, pre_process, post_process, vp_stage)
            teacher = build(teacher_config, pre_process, post_process, vp_stage).eval()
            state = dist_checkpointing.load({"model": teacher.sharded_state_dict()}, teacher_checkpoint)
            teacher.load_state_dict(state["model"])
            teachers.append(teacher)
            student.config.variable_seq_lengths = True
            return student

        teachers = []
        forward_step = vcrd.megatron.distill(forward_step, teacher=lambda: teachers)
        pretrain(container, datasets, model_type, forward_step, model_provider)   # with container.model None

    A function is called at each stage's first forward step, which stages reach one after another. So it must not wait
    for other stages, as loading a checkpoint does. `examples/local_teacher.py` loads it where the student is built.

    With the payload "hidden" the teacher's logits are never stored: the loss makes them block by block, in float32,
    from the last hidden states, which takes a second product with the output layer in backward. With "float16", the
    default, or "float32" they are stored and read as they are, which is faster and takes one more tensor [s, b, v/tp]
    while the loss is computed. Nothing is encoded, because no logits travel.

    A micro-batch may have tokens that the teacher alone sees (`teacher_context.context_of`), up to the setting
    `teacher_context_length`. The teacher then has longer rows, positions and masks of its own, and its answer has the
    student's positions. Between stages its states fill more columns beside the student's (`_joined`). The first and
    the last stage draw each micro-batch, as Megatron's scripts do, and a stage between them must draw it only if it is
    given a mask or packed sequences. With context parallelism the teacher's rows are divided like the student's.

    With validity "privileged" the teacher runs twice for each micro-batch: without the context, which gives the answer,
    and with it, as the judge. The states of both runs travel beside the student's.

    Collectives: the teacher's own, and Megatron's exchange of shapes between stages. With `teacher_context_length` on
    each stage a broadcast of each question over the tensor ranks, for which the host waits; without it one with the
    first micro-batch. For a context, an all-gather of the last hidden states over the context-parallel ranks.
    bytes_received: 0.
    """

    names = ("",)
    waits = Waits()
    bytes_received = 0

    def __init__(
        self, settings: DistillSettings, model: TeacherModel, tokens_of: TokensOf = "tokens"
    ) -> None:
        _refuse_other_teachers(settings)
        if settings.link.payload not in _PAYLOADS:
            raise expected(
                "payload",
                f"one of {', '.join(_PAYLOADS)} with a teacher in the same ranks, whose logits do not travel",
                repr(settings.link.payload),
            )
        if not (callable(model) or isinstance(model, (list, tuple))):
            raise wrong_type("teacher", "a model, a list of its chunks or a function that returns one", model)
        self._settings = settings
        self._model = model
        self._parts: dict[int, _Part] = {}  # by the number of the interleaved pipeline's chunk
        self._tokens_of = tokens_of
        self._drawn: list[Any] = []  # the micro-batch of this forward step, where this rank draws it

    def each(self) -> list[Counters]:
        """The running counts of this one teacher, for which nobody waits."""
        return [Counters(Waits(), (None, 0), 0)]

    def host(self) -> None:
        """Does nothing: there is no rendezvous to open."""

    def connect(self, layout: Layout, tokenizer: Tokenizer | None) -> None:
        """Does nothing: there is no job to wait for."""

    def given(self, arguments: dict[str, Any]) -> None:
        """Does nothing: this teacher is given the same arguments."""

    def watched(self, data_iterator: Any) -> Any:
        """On the last stage: the iterator to draw this micro-batch from. `ExternalValidity` hides the context."""
        self._drawn.clear()
        return recorded(data_iterator, self._drawn)

    def watched_before_last(self, data_iterator: Any) -> Any:
        """On earlier stages: the iterator for the script to draw this micro-batch from, without fields of vcrd."""
        return without_fields(self.watched(data_iterator))

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Opens nothing: no micro-batch is drawn ahead."""
        return contextlib.nullcontext()

    def end_step(self) -> None:
        """Does nothing."""

    @contextlib.contextmanager
    def alongside(self, chunk: nn.Module) -> Iterator[None]:
        """While open, a forward of this chunk of the student runs the teacher's part too.

        Evaluation and recomputation in backward do not open it, and run no teacher. ValueError, before any collective,
        for models that do not fit each other.
        """
        part = self._part(chunk)
        hooks = (
            chunk.register_forward_pre_hook(part.run, with_kwargs=True),
            chunk.register_forward_hook(part.pass_on),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            part.hidden = []

    def answer(self, number: int) -> TeacherLogits | Judged:
        """The teacher's answer to the present micro-batch: logits [s, b, v/tp], or its hidden states."""
        part = next(part for part in self._parts.values() if part.answer is not None)
        answer, part.answer = part.answer, None  # from now on only autograd holds it, until this backward
        return answer

    def close(self) -> None:
        """Drops the model."""
        self._parts.clear()
        self._model = None

    def _part(self, chunk: nn.Module) -> _Part:
        number = getattr(chunk, "vp_stage", None) or 0
        if number not in self._parts:
            if self._model is None:
                raise expected("teacher", "a step before close()", "one after it")
            if not isinstance(self._model, (nn.Module, list, tuple)):
                self._model = self._model()
            chunks = self._model if isinstance(self._model, (list, tuple)) else [self._model]
            count = getattr(chunk.config, "virtual_pipeline_model_parallel_size", None) or 1
            if len(chunks) != count or not all(isinstance(c, nn.Module) for c in chunks):
                raise expected(
                    "teacher",
                    f"{count} model chunk(s) per rank, as the student has",
                    [type(c).__name__ for c in chunks],
                )
            asked = _Asked(chunk, self._settings, self._tokens_of, self._drawn)
            self._parts[number] = _Part(chunk, unwrap(chunks[number]), self._settings, asked)
        part = self._parts[number]
        if part.student is not chunk:
            raise expected("model", "the model that was distilled before", "another one")
        return part


class _Part:
    """One chunk of the teacher beside one of the student.

    hidden: the teacher's states of each run for the next stage, until they are sent with the student's. answer: the
    last stage's, until the loss takes it.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, settings: DistillSettings, asked: _Asked
    ) -> None:
        _check(student, teacher, settings)
        self.student = student
        self.hidden: list[Tensor] = []
        self.answer: TeacherLogits | Judged | None = None
        self._judges = settings.validity == "privileged"
        self._teacher = teacher
        self._extra_heads = ExtraHeads(teacher)
        self._ignores_masks = by_engine(teacher) and not by_engine(student)
        self._signature = inspect.signature(student.forward)
        self._takes = inspect.signature(teacher.forward).parameters
        self._first, self._last = student.pre_process, student.post_process
        self._widths = student.config.hidden_size, teacher.config.hidden_size
        self._asked = asked
        # Ranks among which sequence and context parallelism divide the positions, and the student's positions on each.
        self._parts = asked.layout.context_size
        if getattr(student.config, "sequence_parallel", False):
            self._parts *= asked.layout.tensor_size
        self._length: int | None = None
        self._inputs: PackedInputs | None = None  # of a teacher with rows of its own
        self._output_layer: OutputLayer | None = None
        if self._last and settings.link.payload == "hidden":
            group = asked.layout.tensor_group
            self._output_layer = OutputLayer(teacher, group, "payload 'hidden'", "choose another payload")
            self._weight = _as_multiplied(self._output_layer.weight)

    def run(self, student: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the student's forward: runs the teacher's, on the same tokens or on what the previous stage sent."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        if given.get("decoder_input") is not None:
            raise expected("decoder_input", "None, because the teacher embeds the tokens itself", "a tensor")
        question = self._asked.take(given)
        if self._judges and question is None and (self._first or self._last):
            raise no_context()
        self._refuse_other_borders(given)
        received = [None, None] if self._first else self._split()
        if self._first and (tokens := given.get("input_ids")) is not None:
            self._length = tokens.shape[1] * self._asked.layout.context_size // self._parts
        questions = [None, question] if self._judges else [question]
        found = [
            self._answer(*self._as_seen(each, given, states), states)
            for each, states in zip(questions, received, strict=False)
        ]
        if not self._last:
            self.hidden = found
        else:
            self.answer = Judged(*found) if self._judges else found[0]

    @torch.no_grad()
    def _answer(
        self, rows: TeacherRows | SplitRows | None, given: dict[str, Any], received: Tensor | None
    ) -> TeacherLogits | Tensor:
        """One run of the teacher with these arguments: its answer on the last stage, else its states."""
        teacher = self._teacher
        if self._first and (tokens := given.get("input_ids")) is not None:
            refuse_uneven_tokens(teacher.config, *tokens.shape)
        if teacher.training:
            teacher.eval()
        if not self._first:
            teacher.set_input_tensor(received)
        with self._extra_heads.off(), self._captured(rows) as captured:
            output = teacher(**given)
        if not self._first:
            teacher.set_input_tensor(None)
        return self._form(output, captured, rows) if self._last else output.detach()

    def _as_seen(
        self, question: Question | None, given: dict[str, Any], received: Tensor | None
    ) -> tuple[TeacherRows | SplitRows | None, dict[str, Any]]:
        """The teacher's own rows, None if they are the student's; and the arguments of its forward.

        question: None if this stage has not drawn the micro-batch. received: the teacher's states of the stage before.
        """
        mine = {k: v for k, v in given.items() if k in self._takes and k not in _STUDENTS_OWN}
        if question is not None and len(question.context.places):
            rows, mine = self._with_context(question, given, mine)
            if (
                received is not None
                and len(received) * self._parts != rows.width * self._asked.layout.context_size
            ):
                raise expected(
                    "data_iterator",
                    "the same micro-batch on every stage",
                    "one with another context than before",
                )
            return rows, mine
        if received is None or len(received) == self._length:
            return None, mine
        told = [name for name in _VISIBILITY if given.get(name) is not None]
        if self._last or told:
            raise expected(
                "data_iterator",
                f"a micro-batch with {CONTEXT_KEYS[0]} to be drawn on the last stage, and on a stage that is given "
                f"{' or '.join(_VISIBILITY)}",
                f"none on {'the last stage' if self._last else 'a stage that is given ' + told[0]}",
            )
        # A stage in between needs to know the length of its rows only, and its states have it.
        return None, {**mine, "position_ids": None, "attention_mask": None}

    def _with_context(
        self, question: Question, given: dict[str, Any], mine: dict[str, Any]
    ) -> tuple[TeacherRows | SplitRows, dict[str, Any]]:
        tokens, edges, (context, places), _ = question
        layout, doubts, (batch, sequence) = self._asked.layout, Doubts(), tokens.shape
        size = layout.context_size
        columns = columns_of(sequence, layout.context_rank, size, edges)
        look_for_borders(doubts, given, edges, columns, batch, (given,))
        doubts.send()
        doubts.check()
        multiple = self._unit(sequence // self._parts) * self._parts
        rows = TeacherRows.of(batch, sequence, edges, places, multiple, 2 * size if size > 1 else 1)
        seen = Request(0, 0, rows.fill(tokens, context), rows.edges)
        if self._inputs is None:
            self._inputs = PackedInputs(self._teacher, layout.device)
        positions, mask, packed = self._inputs.of(seen)
        tokens, positions = seen.tokens, rows.real(positions)
        if size > 1:
            rows = SplitRows(rows, edges, layout.groups.context)
            tokens, positions = tokens[:, rows.columns], positions[:, rows.columns.to(layout.device)]
        own = {"input_ids": tokens.to(layout.device), "position_ids": positions, "attention_mask": mask}
        absent = {name: None for name in _VISIBILITY if name in mine}
        return rows, {**mine, **absent, **own, **packed}

    def _unit(self, length: int) -> int:
        """Of which the length of the teacher's own rows on a rank is a multiple, beside `length` of the student's.

        At least length / hidden size, so that one column more or less in `_joined` is another length.
        """
        multiple = row_multiple(self._teacher.config, self._asked.layout.context_size)
        base, least = lcm(multiple, self._parts) // self._parts, -(-length // self._widths[1])
        return -(-least // base) * base

    def _refuse_other_borders(self, given: dict[str, Any]) -> None:
        """ValueError if the student is told which tokens see each other, and the teacher cannot be told."""
        for name in _VISIBILITY:
            if given.get(name) is not None and name not in self._takes:
                raise expected(
                    "teacher",
                    f"a model whose forward takes {name}, which the student is given",
                    f"{type(self._teacher).__name__}, which would look across the borders of packed sequences",
                )
        mask = given.get("attention_mask")
        if self._ignores_masks and isinstance(mask, Tensor):
            doubts, none = Doubts(), torch.empty(0, dtype=torch.int64)
            look_for_borders(
                doubts, {"attention_mask": mask}, none, torch.arange(mask.shape[-1]), len(mask), ()
            )
            doubts.send()
            doubts.check()

    def pass_on(self, student: nn.Module, args: tuple, output: Any) -> Any:
        """After the student's forward: joins both models' states for the next stage."""
        if self._last:
            return None
        joined = output
        for hidden in self.hidden:
            shape = (self._length or len(hidden), hidden.shape[1], self._widths[0])
            if output.dtype != hidden.dtype or tuple(output.shape) != shape:
                raise expected(
                    "teacher",
                    (
                        f"hidden states of the student's dtype and shape {_described(output)} except for the hidden "
                        f"size, which the configuration gives as {self._widths[0]}"
                    ),
                    _described(hidden),
                )
            joined = _joined(joined, hidden)
        self.hidden = []
        return joined

    def _split(self) -> list[Tensor]:
        """Takes the teacher's columns from what the stage received, and leaves the student its own, [s, b, size].

        One tensor for each run of the teacher. The rows of the last run alone may be longer than the student's.
        """
        own, others = self._widths
        last = own + others if self._judges else own  # first column of the last run
        (both,) = _received(self.student)
        length = None if both is None else _teachers_length(both, last, others, self._unit(len(both)))
        if length is None:
            raise expected(
                "forward_step",
                f"one call of the model with hidden states [s, b, {own} + {others}] from the previous stage",
                "none" if both is None else list(both.shape),
            )
        with torch.enable_grad():
            self.student.set_input_tensor(both[..., :own].contiguous())
        self._length = len(both)
        both = both.detach()
        found = [both[..., own:last].contiguous()] if self._judges else []
        return [*found, _parted(both[..., last:], length, others)]

    def _captured(
        self, rows: TeacherRows | SplitRows | None
    ) -> contextlib.AbstractContextManager[Captured | None]:
        if self._output_layer is None:
            return for_students_alone(self._teacher, rows, self._asked.layout.tensor_group)
        self._output_layer.raise_if_different()
        return self._output_layer.captured()

    def _form(
        self, output: Tensor, captured: Captured | None, rows: TeacherRows | SplitRows | None
    ) -> TeacherLogits:
        logits, layer = output.transpose(0, 1), self._output_layer

        def students(found: Tensor) -> Tensor:
            return found if rows is None or len(found) != rows.width else rows.take(found)

        if captured is None or captured.states is None:
            return DenseLogits(students(logits))
        layer.check(logits, self._weight)
        states = students(layer.whole(captured.states))
        return HiddenStates(states, self._weight, layer.scale, layer.softcap)


class _Asked:
    """What the teacher is asked about each micro-batch, told from tensor rank 0 to the other tensor ranks of a stage.

    drawn: the micro-batch of this forward step, if this rank has drawn one.
    """

    def __init__(
        self, student: nn.Module, settings: DistillSettings, tokens_of: TokensOf, drawn: list[Any]
    ) -> None:
        self.layout = Layout.of(student, settings)
        self._longest = settings.link.teacher_context_length
        self._tokens_of = tokens_of
        self._drawn = drawn
        self._told = False  # whether the other ranks were told once

    def take(self, given: dict[str, Any]) -> Question | None:
        """The question, if the micro-batch has a context, the same on every tensor rank; else None.

        given: arguments of the student's forward. ValueError on every tensor rank alike for wrong fields; without
        `teacher_context_length` only with the first micro-batch.
        """
        group = self.layout.tensor_group
        found = self._read(given) if self.layout.tensor_rank == 0 else None
        if group is not None and (self._longest or not self._told):
            said = [found]
            dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group=group)
            (found,) = said
        self._told = True
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _read(self, given: dict[str, Any]) -> Question | str | None:
        """The question; the sentence of an error; None without a context."""
        if any(field(batch, TEACHER_KEY) is not None for batch in self._drawn):
            return str(expected(TEACHER_KEY, "none with a teacher in the same ranks", "some"))
        if all(field(batch, key) is None for batch in self._drawn for key in CONTEXT_KEYS):
            return None
        try:
            if len(self._drawn) != 1:
                what = "forward_step to draw one micro-batch from it per call"
                raise expected("data_iterator", what, len(self._drawn))
            # With context parallelism the model is given only a part of the tokens.
            known = {**given, "input_ids": None} if self.layout.context_size > 1 else given
            question = question_of(self._drawn[0], self._tokens_of, known)
            sizes = {"vocab_size": self.layout.vocab_size, "longest": self._longest, "most": MOST_TOKENS}
            check_context(question.context, *question.tokens.shape, question.edges.tolist(), **sizes)
        except ValueError as error:
            return str(error)
        return question._replace(tokens=question.tokens.cpu()) if len(question.context.places) else None


def _joined(own: Tensor, others: Tensor) -> Tensor:
    """The states of both models in one tensor, for the next stage. own: the student's [s, b, size]. others: the
    teacher's [t, b, other size], t at least s.

    [s, b, size + ceil(t * other size / s)]: the teacher's fill the columns after the student's, sample by sample. So
    none is sent twice, and for t = s they are the columns of the same positions. The shape alone tells t, which is why
    t is a multiple of a unit (`_Part._unit`).
    """
    if len(own) == len(others):
        return torch.cat([own, others], -1)
    length, batch, _ = own.shape
    flat = others.transpose(0, 1).flatten(1)
    columns = -(-flat.shape[1] // length)
    filled = nn.functional.pad(flat, (0, columns * length - flat.shape[1]))
    return torch.cat([own, filled.view(batch, length, columns).transpose(0, 1)], -1)


def _teachers_length(both: Tensor, own: int, others: int, unit: int) -> int | None:
    """The length of the teacher's rows in what `_joined` made; None if it made no such tensor."""
    length, columns = len(both), both.shape[-1] - own
    if columns == others:
        return length
    found = columns * length // others // unit * unit
    return found if found > length and -(-found * others // length) == columns else None


def _parted(columns: Tensor, length: int, size: int) -> Tensor:
    """The teacher's states [t, b, size], in its columns [s, b, ..] of what `_joined` made."""
    if len(columns) == length:
        return columns.contiguous()
    flat = columns.transpose(0, 1).flatten(1)[:, : length * size]
    return flat.view(len(flat), length, size).transpose(0, 1).contiguous()


def _refuse_other_teachers(settings: DistillSettings) -> None:
    """ValueError for settings that a run with a teacher in the same ranks would not follow."""
    what = "none with a teacher in the same ranks"
    for name in ("teacher", "teacher_weights", "teacher_mixture"):
        if (value := settings.value(name)) is not None:
            raise expected(label(name), what, repr(value))
    if teachers_in(settings.link.address):
        raise expected(label("address"), what, repr(settings.link.address))


def _check(student: nn.Module, teacher: nn.Module, settings: DistillSettings) -> None:
    """ValueError, on every stage alike, for a teacher that cannot run beside this student."""
    if student is teacher:
        raise expected("teacher", "a model of its own", "the student")
    mine, theirs = student.config, getattr(teacher, "config", None)
    if not hasattr(theirs, "hidden_size") or not hasattr(teacher, "set_input_tensor"):
        raise expected("teacher", "a Megatron language model", type(teacher).__name__)
    refuse_delayed_scaling(theirs)
    for name in _EQUAL:
        own, got = getattr(mine, name, None), getattr(theirs, name, None)
        if own != got:
            raise expected("teacher", f"{name} {own}, as the student has", got)
    places = [(model.pre_process, model.post_process) for model in (student, teacher)]
    if places[0] != places[1]:
        raise expected(
            "teacher", f"a part with pre_process, post_process {places[0]}, as the student's", places[1]
        )
    if mine.pipeline_model_parallel_size > 1 and not mine.variable_seq_lengths:
        raise expected(
            "variable_seq_lengths",
            (
                "True in the student's configuration, because the teacher's hidden states travel between "
                "pipeline stages beside its own"
            ),
            "False",
        )
    padded, theirs = Layout.of(student, settings), Layout.of(teacher, settings)
    if padded.padded_vocab_size != theirs.padded_vocab_size:
        same = f"the student's padded vocabulary of {padded.padded_vocab_size}"
        if padded.tensor_size > 1:
            raise expected(
                "teacher",
                f"{same}, so that the shards of {padded.tensor_size} tensor ranks line up",
                theirs.padded_vocab_size,
            )
        if settings.vocab_size is None:
            raise expected(
                "vocab_size",
                (
                    f"the true vocabulary in the settings where the teacher's padding ({theirs.padded_vocab_size}) is "
                    f"not the student's ({padded.padded_vocab_size})"
                ),
                "None",
            )
    longest = getattr(teacher, "max_sequence_length", None)
    needed = padded.sequence_length + settings.link.teacher_context_length
    if isinstance(longest, int) and longest < needed:
        raise expected("teacher", f"sequences of up to {needed} tokens", f"a model of {longest}")


def _received(student: nn.Module) -> list[Tensor | None]:
    """What the schedule gave the stage. Megatron's decoders keep it as `input_tensor`."""
    found = getattr(getattr(student, "decoder", None), "input_tensor", None)
    return found if isinstance(found, list) else [found]


def _as_multiplied(weight: Tensor) -> Tensor:
    """The shard as the loss multiplies it: the parameter itself where possible, and no copy of it."""
    weight = weight.detach() if type(weight) in (Tensor, nn.Parameter) else plain_copy(weight)
    return factor_of(weight, weight.dtype)  # here once, not once per micro-batch


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
