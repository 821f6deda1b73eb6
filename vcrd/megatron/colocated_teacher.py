"""A frozen teacher in the student's ranks: each pipeline stage runs the teacher's part before the student's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vcrd.errors import expected, wrong_type
from vcrd.link.handshake import Tokenizer
from vcrd.link.student import Waits
from vcrd.megatron.compatibility import refuse_delayed_scaling, refuse_uneven_tokens
from vcrd.megatron.hooks import ExtraHeads
from vcrd.megatron.layout import Layout, plain_copy, unwrap
from vcrd.megatron.output_layer import Captured, OutputLayer
from vcrd.megatron.packing import Doubts, by_engine, look_for_borders
from vcrd.settings import DistillSettings
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

    Collectives: the teacher's own, and Megatron's exchange of shapes between stages. bytes_received: 0.
    """

    waits = Waits()
    served_by = (None, 0)
    bytes_received = 0

    def __init__(self, settings: DistillSettings, model: TeacherModel) -> None:
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

    def host(self) -> None:
        """Does nothing: there is no rendezvous to open."""

    def connect(self, layout: Layout, tokenizer: Tokenizer | None) -> None:
        """Does nothing: there is no job to wait for."""

    def given(self, arguments: dict[str, Any]) -> None:
        """Does nothing: this teacher is given the same arguments."""

    def watched(self, data_iterator: Any) -> Any:
        """The script's own iterator: the teacher needs only what the student is given."""
        return data_iterator

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
            part.hidden = None

    def answer(self, number: int) -> TeacherLogits:
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
            self._parts[number] = _Part(chunk, unwrap(chunks[number]), self._settings)
        part = self._parts[number]
        if part.student is not chunk:
            raise expected("model", "the model that was distilled before", "another one")
        return part


class _Part:
    """One chunk of the teacher beside one of the student.

    hidden: the teacher's states for the next stage, until they are sent with the student's. answer: the last stage's,
    until the loss takes it.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: DistillSettings) -> None:
        _check(student, teacher, settings)
        self.student = student
        self.hidden: Tensor | None = None
        self.answer: TeacherLogits | None = None
        self._teacher = teacher
        self._extra_heads = ExtraHeads(teacher)
        self._ignores_masks = by_engine(teacher) and not by_engine(student)
        self._signature = inspect.signature(student.forward)
        self._takes = inspect.signature(teacher.forward).parameters
        self._first, self._last = student.pre_process, student.post_process
        self._widths = student.config.hidden_size, teacher.config.hidden_size
        self._output_layer: OutputLayer | None = None
        if self._last and settings.link.payload == "hidden":
            group = Layout.of(student, settings).tensor_group
            self._output_layer = OutputLayer(teacher, group, "payload 'hidden'", "choose another payload")
            self._weight = _as_multiplied(self._output_layer.weight)

    def run(self, student: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the student's forward: runs the teacher's, on the same tokens or on what the previous stage sent."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        if given.get("decoder_input") is not None:
            raise expected("decoder_input", "None, because the teacher embeds the tokens itself", "a tensor")
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
            with self._extra_heads.off(), self._captured() as captured:
                output = teacher(**given)
            if not self._first:
                teacher.set_input_tensor(None)
            if self._last:
                self.answer = self._form(output, captured)
            else:
                self.hidden = output.detach()

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
        """After the student's forward: joins both models' states, [s, b, sum of both sizes], for the next stage."""
        if self._last:
            return None
        hidden, self.hidden = self.hidden, None
        shape = (*hidden.shape[:2], self._widths[0])
        if output.dtype != hidden.dtype or tuple(output.shape) != shape:
            raise expected(
                "teacher",
                (
                    f"hidden states of the student's dtype and shape {_described(output)} except for the hidden size, "
                    f"which the configuration gives as {self._widths[0]}"
                ),
                _described(hidden),
            )
        return torch.cat([output, hidden], -1)

    def _split(self) -> Tensor:
        """Takes the teacher's columns from what the stage received, and leaves the student its own, [s, b, size]."""
        own, others = self._widths
        (both,) = _received(self.student)
        if both is None or both.shape[-1] != own + others:
            raise expected(
                "forward_step",
                f"one call of the model with hidden states [s, b, {own} + {others}] from the previous stage",
                "none" if both is None else list(both.shape),
            )
        with torch.enable_grad():
            self.student.set_input_tensor(both[..., :own].contiguous())
        return both[..., own:].detach().contiguous()

    def _captured(self) -> contextlib.AbstractContextManager[Captured | None]:
        if self._output_layer is None:
            return contextlib.nullcontext()
        self._output_layer.raise_if_different()
        return self._output_layer.captured()

    def _form(self, output: Tensor, captured: Captured | None) -> TeacherLogits:
        logits, layer = output.transpose(0, 1), self._output_layer
        if captured is None or captured.states is None:
            return DenseLogits(logits)
        layer.check(logits, self._weight)
        return HiddenStates(layer.whole(captured.states), self._weight, layer.scale, layer.softcap)


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
    if isinstance(longest, int) and longest < padded.sequence_length:
        raise expected(
            "teacher", f"sequences of up to {padded.sequence_length} tokens", f"a model of {longest}"
        )


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
