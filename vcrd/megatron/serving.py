"""The teacher job: a Megatron model answers the student's requests through Megatron's own pipeline schedule."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.errors import HandshakeRefused, StudentLost
from vcrd.link.handshake import LONGEST_NAME, Head, Identity, TeacherPlace
from vcrd.link.teacher import Request, TeacherLink
from vcrd.megatron.compatibility import (
    refuse_delayed_scaling,
    refuse_dependent_replicas,
    refuse_uneven_tokens,
)
from vcrd.megatron.hooks import ExtraHeads
from vcrd.megatron.identity import tokenizer_of, weights_of
from vcrd.megatron.layout import Layout, plain_copy, schedule_of, unwrap
from vcrd.megatron.metrics import start_telemetry
from vcrd.megatron.output_layer import Captured, OutputLayer
from vcrd.megatron.packing import PackedInputs
from vcrd.megatron.teacher_context import TeacherRows, for_students_alone, of_any_width, row_multiple
from vcrd.megatron.training_loop import training_loop
from vcrd.monitor.bottleneck import idle_sentence
from vcrd.monitor.telemetry import Telemetry
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")
_AFTER_REFUSAL = 5.0  # seconds in which a refused student job ends and closes its rendezvous


class Link(Protocol):
    """Where answers go: `TeacherLink`, or the files of a cache."""

    def respond(self, request: Request, output: Tensor) -> None:
        """On ranks of the last stage. output: logits [s, b, padded columns], or hidden states [s, b, size]."""


def serve(
    model: Any,
    settings: DistillSettings | None = None,
    *,
    microbatches: int | None = None,
    stay: bool = False,
    tokenizer: Any = None,
    checkpoint: str | None = None,
) -> int:
    """Answers requests with the model's logits until every student has said goodbye; returns the number of answers.

    Args:
        model: this rank's part of the teacher, in a list or not, wrapped or not. It is called as model(tokens [b, s],
            position_ids [b, s], None), applies a causal mask of its own, and must return logits [b, s, padded
            vocabulary / tensor size] on the last stage. For packed sequences see `PackedInputs`. Heads of multi-token
            prediction are not run. A request with a context that the student does not see gets longer rows, and is
            answered for the student's positions (`TeacherRows`). With the payload "hidden" its output layer runs on a
            few test states only, in one pass of 16, the first among them.
        settings: default `DistillSettings.from_environment()`; the loss fields are not read.
        microbatches: the most queued requests that go through the pipeline together, so that its stages overlap.
            Default: twice the number of stages.
        stay: after a student job has said goodbye or died, wait for the next, until none has come for `connect_timeout`
            seconds. A job that does not fit is refused, and the teacher job goes on.
        tokenizer: the one that the model was trained with, to be compared with the student's: Megatron's, Hugging
            Face's or a `vcrd.link.Tokenizer`. Default: that of `megatron.training`, if it runs.
        checkpoint: a name of these weights, for messages. Default: the --load of `megatron.training`.

    The student refuses a teacher with another vocabulary, and one with other weights than the first teacher of the run,
    after a restart or in another replica (the setting `identity`). So each rank reads its weights once before it joins.

    Every rank of the job calls this. Each data-parallel rank is a replica. Tensor and pipeline parallelism may have any
    size, and may differ from the student's. Context parallelism is refused, and so is expert parallelism across
    replicas. No logits are gathered: each rank sends its own columns.

    Raises LinkError, alike on every rank of a replica, if a student is lost or the jobs do not fit, and ValueError for
    a model or micro-batches that cannot be served.
    """
    settings = DistillSettings.from_environment() if settings is None else settings
    served = 0
    with prepared(model, settings, microbatches, tokenizer, checkpoint) as teacher:
        serving = Serving(start_telemetry(teacher.chunk, settings, "teacher"), teacher.layout)
        try:
            for link in _links(settings, teacher, stay):
                try:
                    served += _serve_job(teacher, link, serving)
                except StudentLost as error:
                    if not stay:
                        raise
                    _log.warning("%s", error)
        finally:
            serving.close()
    return served


@dataclass(frozen=True)
class Prepared:
    """This rank's part of a teacher that is ready to answer. limit: of micro-batches in one pass of the pipeline.
    head: on the last stage with the payload "hidden"."""

    model: Any
    chunk: torch.nn.Module  # the model without its wrappers
    layout: Layout
    head: ServedHead | None
    identity: Identity
    limit: int

    @property
    def positions(self) -> int:
        """The longest sequence that the model takes; 0 if it names none."""
        found = getattr(self.chunk, "max_sequence_length", None)
        return found if isinstance(found, int) else 0

    def answer(self, requests: list[Request], link: Link) -> None:
        """One pass of the pipeline, in which the last stage calls `link.respond` for each request, in order."""
        _answer(self.model, requests, link, self.head, self.layout)


@contextlib.contextmanager
def prepared(
    model: Any, settings: DistillSettings, microbatches: int | None, tokenizer: Any, checkpoint: str | None
) -> Iterator[Prepared]:
    """The arguments as of `serve`. The model is in evaluation mode while the block runs."""
    chunks = model if isinstance(model, (list, tuple)) else [model]
    if len(chunks) != 1:
        raise expected("model", "one chunk, because teachers do not interleave stages", len(chunks))
    if microbatches is not None and microbatches < 1:
        raise expected("microbatches", "at least 1", microbatches)
    chunk = unwrap(chunks[0])
    layout = Layout.of(chunk, settings)
    refuse_dependent_replicas(chunk, layout.groups)
    refuse_delayed_scaling(chunk.config)
    head = None
    if settings.link.payload == "hidden" and layout.groups.last_stage:
        head = ServedHead(chunk, layout.tensor_group)
    identity = _identity(chunk, layout, tokenizer, checkpoint)
    limit = microbatches or 2 * layout.groups.pipeline.size()
    training = chunk.training
    chunk.eval()
    try:
        yield Prepared(chunks[0], chunk, layout, head, identity, limit)
    finally:
        chunk.train(training)


def _identity(chunk: torch.nn.Module, layout: Layout, tokenizer: Any, checkpoint: str | None) -> Identity:
    """What this rank states of its tokenizer and weights. It warns of what it does not know."""
    found = tokenizer_of(tokenizer)
    if found is None and dist.get_rank() == 0:
        _log.warning("tokenizer: not known in the teacher job, so it is not compared: pass one to serve()")
    try:
        weights = weights_of(chunk, layout.vocab_size)
    except ValueError as error:
        weights = None
        _log.warning("a teacher that comes back with other weights will not be noticed: %s", error)
    if checkpoint is None:
        loop = training_loop()
        checkpoint = str(getattr(loop and loop.arguments, "load", None) or "")
    return Identity(found, weights, checkpoint[-LONGEST_NAME:])


def _links(settings: DistillSettings, teacher: Prepared, stay: bool) -> Iterator[TeacherLink]:
    """Links to one student job after another; to a single one without `stay`."""
    came = False
    while stay or not came:
        try:
            link = _connect(settings, teacher)
        except HandshakeRefused as error:
            if not stay:
                raise
            _log.warning("%s", error)
            time.sleep(_AFTER_REFUSAL)
            continue
        except StudentLost as error:
            if not came:
                raise
            _log.info("%s", error)
            return
        came = True
        yield link


def _connect(settings: DistillSettings, teacher: Prepared) -> TeacherLink:
    layout, head = teacher.layout, teacher.head
    return TeacherLink.connect(
        settings.link,
        vocab_size=layout.vocab_size,
        padded_vocab_size=layout.padded_vocab_size,
        sequence_length=layout.sequence_length,
        place=place_of(layout),
        group=layout.groups.model,
        tensor_group=layout.tensor_group,
        head=head.facts if head else None,
        head_weight=head.weight if head else None,
        device=layout.device,
        identity=teacher.identity,
        positions=teacher.positions,
    )


def place_of(layout: Layout) -> TeacherPlace:
    return TeacherPlace(
        replica=layout.data_rank,
        replicas=layout.data_size,
        tensor_rank=layout.tensor_rank,
        tensor_size=layout.tensor_size,
        is_last_stage=layout.groups.last_stage,
    )


def _serve_job(teacher: Prepared, link: TeacherLink, serving: Serving) -> int:
    """Answers one student job until its goodbye; returns the number of micro-batches."""
    served = 0
    try:
        serving.begin(link)
        while (requests := link.next_batch(teacher.limit)) is not None:
            serving.idled()
            teacher.answer(requests, link)
            served += len(requests)
            serving.answered(len(requests), link)
    finally:
        serving.end()
        link.close()
    _log.info("served %d micro-batches", served)
    serving.log_if_idle()
    return served


@torch.no_grad()
def _answer(
    model: Any,
    requests: list[Request],
    link: Link,
    head: ServedHead | None,
    layout: Layout,
) -> None:
    """One pass through the pipeline, forward only, with one micro-batch per request. All have the same shape.

    Their contexts may differ, and with them the lengths of the teacher's rows. How long they are depends on the request
    alone, and not on those in the same pass, so that a repeated request gets the same bits.
    """
    chunk = unwrap(model)
    multiple = row_multiple(chunk.config)
    passes = [(request, *_seen(request, multiple)) for request in requests]
    shapes = {tuple(seen.tokens.shape) for _, seen, _ in passes}
    for shape in shapes:
        refuse_uneven_tokens(chunk.config, *shape)
    inputs = PackedInputs(chunk, layout.device)

    def forward_step(data_iterator: Iterator[tuple], model: Any) -> tuple[Tensor, Any]:
        request, seen, rows = next(data_iterator)
        tokens = seen.tokens.to(layout.device)
        positions, mask, packed = inputs.of(seen)
        positions = positions if rows is None else rows.real(positions)
        capture = head.captured() if head else for_students_alone(chunk, rows, layout.tensor_group)
        with capture as captured:
            output = model(tokens, positions, mask, **packed)
        return output, partial(_respond, link, request, rows, head, captured)

    with ExtraHeads(chunk).off(), of_any_width(chunk.config, len(shapes) > 1):
        schedule_of(chunk)(
            forward_step_func=forward_step,
            data_iterator=iter(passes),
            model=model,
            num_microbatches=len(requests),
            seq_length=max(width for _, width in shapes),
            micro_batch_size=len(requests[0].tokens),
            forward_only=True,
            collect_non_loss_data=True,
        )


def _respond(
    link: Link,
    request: Request,
    rows: TeacherRows | None,
    head: ServedHead | None,
    captured: Captured | None,
    output: Tensor,
    non_loss_data: bool = True,
) -> None:
    """Sends the answer to a request as soon as the last stage has it, so that the schedule keeps nothing.

    output: logits [b, s, v/tp]; with a head its states [s, b, hidden size] are sent in place of logits. rows: where the
    student's positions lie among those of the output or of the states; None if there are no others.
    """
    if head is None or captured.states is None:
        found = output.transpose(0, 1)
    else:
        head.layer.check(output.transpose(0, 1), head.weight)
        found = head.layer.whole(captured.states)
    if rows is not None and len(found) == rows.width:
        found = rows.take(found)
    link.respond(request, found)


def _seen(request: Request, multiple: int) -> tuple[Request, TeacherRows | None]:
    """The request with the rows that the teacher's model is given, and where the student's tokens lie in them."""
    places = request.context.places
    if not len(places):
        return request, None
    rows = TeacherRows.of(*request.tokens.shape, request.boundaries, places, multiple)
    tokens = rows.fill(request.tokens, request.context.tokens)
    return replace(request, tokens=tokens, boundaries=rows.edges), rows


class ServedHead:
    """The output layer of a teacher with the payload "hidden". Students receive it when they join, and later states.

    weight: a copy of this rank's shard, from before the first request. facts: the layer's part of the handshake.
    """

    def __init__(self, chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None) -> None:
        self.layer = OutputLayer(chunk, tensor_group, "payload 'hidden'", "choose another payload")
        self.weight = plain_copy(self.layer.weight)
        self.facts = Head(
            size=self.weight.shape[1],
            dtype=str(self.weight.dtype).removeprefix("torch."),
            scale=self.layer.scale,
            softcap=self.layer.softcap,
        )

    def captured(self) -> contextlib.AbstractContextManager[Captured]:
        """As of `OutputLayer`. On a GPU the model's error is noticed here, one pass later."""
        self.layer.raise_if_different()
        return self.layer.captured()


class Serving:
    """How a rank of a teacher replica spends its time: idle, which is waiting for requests, or answering them.

    "sending" is the part of answering in which it waits for earlier answers to leave. All are seconds of the host. On a
    GPU answers leave when they are computed, so that this wait includes waiting for the device; `gpu_utilization`
    tells the two apart.
    """

    def __init__(self, telemetry: Telemetry | None, layout: Layout) -> None:
        self._telemetry = telemetry
        self._replica = layout.data_rank
        self._reports = layout.groups.last_stage and layout.tensor_rank == 0
        self._mark = time.perf_counter()
        self._idle = self._busy = self._blocked = 0.0

    def begin(self, link: TeacherLink) -> None:
        """A student job has joined."""
        self._mark = time.perf_counter()
        self._idle = self._busy = self._blocked = 0.0
        if self._telemetry is not None:
            self._telemetry.enter("idle")
            self._telemetry.follow("bytes_sent", lambda: link.bytes_sent)

    def idled(self) -> None:
        """Requests have come."""
        self._idle += self._lap()
        if self._telemetry is not None:
            self._telemetry.enter("answering")

    def answered(self, requests: int, link: TeacherLink) -> None:
        """This rank has answered them."""
        self._busy += self._lap()
        if self._telemetry is not None:
            self._telemetry.enter("idle")
            self._telemetry.add(answers=requests, sending=link.blocked - self._blocked)
        self._blocked = link.blocked

    def end(self) -> None:
        """The student job has gone. To be called before the link to it is closed."""
        if self._telemetry is not None:
            self._telemetry.enter(None)
            self._telemetry.unfollow("bytes_sent")

    def log_if_idle(self) -> None:
        """After a student job: a line in the log if this replica was more idle than it should be.

        The last stage is the least idle: it has requests from their arrival until the answers have left, and the
        pipeline is no faster than that.
        """
        said = idle_sentence(self._replica, self._idle / max(1e-9, self._idle + self._busy))
        if said is None or not self._reports:
            return
        _log.info("%s", said)
        if self._telemetry is not None:
            self._telemetry.write("idle", sentence=said)

    def close(self) -> None:
        if self._telemetry is not None:
            self._telemetry.close()

    def _lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before
