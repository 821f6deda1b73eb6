"""A frozen teacher inside the student's ranks: each pipeline stage runs its part of it before its own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vcrd.link.handshake import Tokenizer
from vcrd.link.student import Waits
from vcrd.megatron.borders import Doubts, look_for_borders
from vcrd.megatron.extra_heads import ExtraHeads
from vcrd.megatron.fp8 import refuse_delayed_scaling, refuse_uneven_tokens
from vcrd.megatron.layout import Layout, unwrap
from vcrd.megatron.output_layer import OutputLayer
from vcrd.megatron.packing import by_engine
from vcrd.megatron.remote_teacher import TeacherForm
from vcrd.settings import DistillSettings
from vcrd.teacher_logits import HiddenStates

TeacherModel = nn.Module | list[nn.Module] | Callable[[], nn.Module | list[nn.Module]]

_PAYLOADS = ("hidden", "float16", "float32")
# What both configurations must agree on: the stages meet, and the shards of the vocabulary line up.
_EQUAL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
)
# What the student's forward is given and its teacher's is not: with labels it would return a loss.
_STUDENTS_OWN = ("labels", "loss_mask")
_WHO_SEES_WHOM = ("packed_seq_params", "packing_kwargs", "attention_mask")


class ColocatedTeacher:
    """In the place of `RemoteTeacher`: on every rank `alongside` each forward step, on the last stage `answer`.

    The teacher has the student's tensor, pipeline and context parallelism, and its interleaving; with tensor
    parallelism also its padded vocabulary. Layers, heads and hidden size are its own. It is given what the script gives
    the student's forward, but for labels and loss mask, runs in eval mode without a graph, and never becomes a part of
    the student: not in its parameters, and not in its checkpoints.

    Between pipeline stages the teacher's hidden states travel beside the student's, in one tensor
    [s, b, student's hidden size + teacher's], both of one dtype. Megatron sends it as it sends any other, where the
    student's configuration has `variable_seq_lengths`, and nothing of Megatron is changed. The teacher's columns get
    zeros for a gradient. A model provider that builds both sets it in the end (Megatron's arguments cannot, and
    its constructor refuses it with the token dispatcher "allgather", which fixed lengths do not mind):

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

    A function is called at each stage's first forward step, to which stages come one after another: it must do nothing
    that waits for other stages, such as loading. `examples/local_teacher.py` does it where the student is built.

    With the payload "hidden" the teacher's logits are never built: the loss makes them by blocks, in float32, from the
    last hidden states, which takes a second product with the output layer in backward. With "float16", the default, or
    "float32" they are built and read as they are: faster, and one more tensor [s, b, v/tp] while the loss is computed.
    Nothing is encoded, for nothing of it travels.

    Collectives: the teacher's own, and Megatron's exchange of shapes between stages. waited: 0.0. bytes_received: 0.
    """

    waited = 0.0
    waits = Waits()
    served_by = (None, 0)
    bytes_received = 0

    def __init__(self, settings: DistillSettings, model: TeacherModel) -> None:
        if settings.link.payload not in _PAYLOADS:
            raise ValueError(
                f"payload: expected one of {', '.join(_PAYLOADS)} with a teacher in the same ranks, whose logits do "
                f"not travel, got {settings.link.payload!r}"
            )
        if not (callable(model) or isinstance(model, (list, tuple))):
            raise TypeError(
                "teacher: expected a model, a list of its chunks or a function that returns one, "
                f"got {type(model).__name__}"
            )
        self._settings = settings
        self._model = model
        self._parts: dict[int, _Part] = {}  # by chunk of the interleaved pipeline

    def host(self) -> None:
        """Nothing to open."""

    def connect(self, layout: Layout, tokenizer: Tokenizer | None) -> None:
        """Nothing to wait for."""

    def given(self, arguments: dict[str, Any]) -> None:
        """Nothing to compare: this teacher is given the same arguments."""

    def watched(self, data_iterator: Any) -> Any:
        """The script's own: what the teacher needs is what the student is given."""
        return data_iterator

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to keep apart, for nothing is drawn ahead."""
        return contextlib.nullcontext()

    def end_step(self) -> None:
        """Nothing to note."""

    @contextlib.contextmanager
    def alongside(self, chunk: nn.Module) -> Iterator[None]:
        """While open, a forward of this chunk of the student runs the teacher's part too.

        Only while open: evaluation, and recomputation in backward, run no teacher. ValueError, before any collective,
        for models that do not fit.
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
            part.hidden = None

    def answer(self, number: int) -> TeacherForm:
        """What the teacher made of the micro-batch under way: logits [s, b, v/tp], or its hidden states."""
        part = next(part for part in self._parts.values() if part.answer is not None)
        answer, part.answer = part.answer, None  # from here on autograd alone holds it, until this backward
        return answer

    def close(self) -> None:
        """Lets go of the model."""
        self._parts.clear()
        self._model = None

    def _part(self, chunk: nn.Module) -> _Part:
        number = getattr(chunk, "vp_stage", None) or 0
        if number not in self._parts:
            if self._model is None:
                raise ValueError("teacher: expected a step before close(), got one after it")
            if not isinstance(self._model, (nn.Module, list, tuple)):
                self._model = self._model()
            chunks = self._model if isinstance(self._model, (list, tuple)) else [self._model]
            expected = getattr(chunk.config, "virtual_pipeline_model_parallel_size", None) or 1
            if len(chunks) != expected or not all(isinstance(c, nn.Module) for c in chunks):
                raise ValueError(
                    f"teacher: expected {expected} model chunk(s) per rank, as the student has, "
                    f"got {[type(c).__name__ for c in chunks]}"
                )
            self._parts[number] = _Part(chunk, unwrap(chunks[number]), self._settings)
        part = self._parts[number]
        if part.student is not chunk:
            raise ValueError("model: expected the model that was distilled before, got another one")
        return part


class _Part:
    """One chunk of the teacher beside one of the student. hidden: what goes on with the student's output, if anything.
    answer: what the last stage made for the loss, until that takes it."""

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: DistillSettings) -> None:
        _check(student, teacher, settings)
        self.student = student
        self.hidden: Tensor | None = None
        self.answer: TeacherForm | None = None
        self._teacher = teacher
        self._extra_heads = ExtraHeads(teacher)
        self._ignores_masks = by_engine(teacher) and not by_engine(student)
        self._signature = inspect.signature(student.forward)
        self._takes = inspect.signature(teacher.forward).parameters
        self._first, self._last = student.pre_process, student.post_process
        self._widths = student.config.hidden_size, teacher.config.hidden_size
        self._output_layer: OutputLayer | None = None
        if self._last and settings.link.payload == "hidden":
            self._output_layer = OutputLayer(teacher, Layout.of(student, settings).tensor_group)
            self._weight = _weight(teacher, self._output_layer)

    def run(self, student: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the student's forward: the teacher's, on the same tokens or on what the stage before has sent."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        if given.get("decoder_input") is not None:
            raise ValueError(
                "decoder_input: expected None, for the teacher embeds the tokens itself, got a tensor"
            )
        self._refuse_other_borders(given)
        given = {k: v for k, v in given.items() if k in self._takes and k not in _STUDENTS_OWN}
        teacher = self._teacher
        if self._first and (tokens := given.get("input_ids")) is not None:
            refuse_uneven_tokens(teacher.config, *tokens.shape)
        if teacher.training:
            teacher.eval()
        with torch.no_grad():
            if not self._first:
                teacher.set_input_tensor(self._split())
            with (
                self._extra_heads.off(),
                contextlib.nullcontext()
                if self._output_layer is None
                else self._output_layer.captured() as states,
            ):
                output = teacher(**given)
            if not self._first:
                teacher.set_input_tensor(None)
            if self._last:
                self.answer = self._form(output, states[-1] if states else None)
            else:
                self.hidden = output.detach()

    def _refuse_other_borders(self, given: dict[str, Any]) -> None:
        """ValueError where the student is told whom its tokens may see, and the teacher cannot be told so."""
        for name in _WHO_SEES_WHOM:
            if given.get(name) is not None and name not in self._takes:
                raise ValueError(
                    f"teacher: expected a model whose forward takes {name}, which the student is given, "
                    f"got {type(self._teacher).__name__}, which would look across the borders of packed sequences"
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
        """After it: the student's hidden states and the teacher's, [s, b, both sizes], for the next stage."""
        if self._last:
            return None
        hidden, self.hidden = self.hidden, None
        expected = (*hidden.shape[:2], self._widths[0])
        if output.dtype != hidden.dtype or tuple(output.shape) != expected:
            raise ValueError(
                f"teacher: expected hidden states of the student's dtype and shape {_described(output)} but for the "
                f"hidden size, which the configuration gives as {self._widths[0]}, got {_described(hidden)}"
            )
        return torch.cat([output, hidden], -1)

    def _split(self) -> Tensor:
        """Takes the teacher's columns off what the stage received; the student keeps its own, [s, b, size]."""
        own, others = self._widths
        (both,) = _received(self.student)
        if both is None or both.shape[-1] != own + others:
            raise ValueError(
                f"forward_step: expected one call of the model with hidden states [s, b, {own} + {others}] from the "
                f"stage before, got {'none' if both is None else list(both.shape)}"
            )
        with torch.enable_grad():
            self.student.set_input_tensor(both[..., :own].contiguous())
        return both[..., own:].detach().contiguous()

    def _form(self, output: Tensor, states: Tensor | None) -> TeacherForm:
        logits = output.transpose(0, 1)
        if states is None:
            return logits
        self._output_layer.check(logits)
        head = self._output_layer.head
        return HiddenStates(states, self._weight, head.scale, head.softcap or None)


def _check(student: nn.Module, teacher: nn.Module, settings: DistillSettings) -> None:
    """ValueError, on every stage alike, for a teacher that cannot stand beside this student."""
    if student is teacher:
        raise ValueError("teacher: expected a model of its own, got the student")
    mine, theirs = student.config, getattr(teacher, "config", None)
    if not hasattr(theirs, "hidden_size") or not hasattr(teacher, "set_input_tensor"):
        raise ValueError(f"teacher: expected a Megatron language model, got {type(teacher).__name__}")
    refuse_delayed_scaling(theirs)
    for name in _EQUAL:
        expected, got = getattr(mine, name, None), getattr(theirs, name, None)
        if expected != got:
            raise ValueError(f"teacher: expected {name} {expected}, as the student has, got {got}")
    places = [(model.pre_process, model.post_process) for model in (student, teacher)]
    if places[0] != places[1]:
        raise ValueError(
            f"teacher: expected a part with pre_process, post_process {places[0]}, as the student's, got {places[1]}"
        )
    if mine.pipeline_model_parallel_size > 1 and not mine.variable_seq_lengths:
        raise ValueError(
            "variable_seq_lengths: expected True in the student's configuration, for the teacher's hidden states "
            "travel between pipeline stages beside its own, got False"
        )
    padded, theirs = Layout.of(student, settings), Layout.of(teacher, settings)
    if padded.padded_vocab_size != theirs.padded_vocab_size:
        same = f"the student's padded vocabulary of {padded.padded_vocab_size}"
        if padded.tensor_size > 1:
            raise ValueError(
                f"teacher: expected {same}, so that the shards of {padded.tensor_size} tensor ranks line up, "
                f"got {theirs.padded_vocab_size}"
            )
        if settings.vocab_size is None:
            raise ValueError(
                f"vocab_size: expected the true vocabulary in the settings where the teacher's padding "
                f"({theirs.padded_vocab_size}) is not the student's ({padded.padded_vocab_size}), got None"
            )
    longest = getattr(teacher, "max_sequence_length", None)
    if isinstance(longest, int) and longest < padded.sequence_length:
        raise ValueError(
            f"teacher: expected sequences of up to {padded.sequence_length} tokens, got a model of {longest}"
        )


def _received(student: nn.Module) -> list[Tensor | None]:
    """What the schedule gave the stage: Megatron's decoders keep it as `input_tensor`."""
    found = getattr(getattr(student, "decoder", None), "input_tensor", None)
    return found if isinstance(found, list) else [found]


def _weight(teacher: nn.Module, layer: OutputLayer) -> Tensor:
    """The output layer's shard as it is multiplied: the parameter itself wherever it can be, and no copy of it."""
    weight = teacher.output_layer.weight
    if getattr(teacher, "share_embeddings_and_output_weights", False):
        weight = teacher.shared_embedding_or_output_weight()
    if type(weight) in (Tensor, nn.Parameter):
        layer.weight = weight.detach()
    # On the CPU the loss multiplies in float32: converted here once, not once per micro-batch.
    return layer.weight if layer.weight.is_cuda else layer.weight.float()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
