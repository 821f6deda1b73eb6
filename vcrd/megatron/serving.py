"""The teacher's job: any Megatron model answers the student's requests through Megatron's own pipeline schedule."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from vcrd.link.errors import HandshakeRefused, StudentLost
from vcrd.link.handshake import LONGEST_NAME
from vcrd.link.teacher import Request, TeacherLink
from vcrd.megatron.extra_heads import ExtraHeads
from vcrd.megatron.fp8 import refuse_delayed_scaling, refuse_uneven_tokens
from vcrd.megatron.identity import checkpoint_name, tokenizer_of, weights_of
from vcrd.megatron.layout import Layout, unwrap
from vcrd.megatron.output_layer import OutputLayer
from vcrd.megatron.packing import PackedInputs
from vcrd.megatron.rank_telemetry import Serving, telemetry_of
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")
_AFTER_REFUSAL = 5.0  # seconds, in which a job that was refused ends and withdraws its address


def serve(
    model: Any,
    settings: DistillSettings | None = None,
    *,
    microbatches: int | None = None,
    stay: bool = False,
    tokenizer: Any = None,
    checkpoint: str | None = None,
) -> int:
    """Answers requests with the model's logits until every student has said goodbye; returns how many.

    model: this rank's part of the teacher (in a list or not, wrapped or not), with positions 0 .. s-1 and a
        causal mask of its own: it is called as model(tokens [b, s], position_ids [b, s], None) and must return
        logits [b, s, padded vocabulary / tensor size] on the last stage. For sequences that are packed into one row
        see `PackedInputs`. Its heads of multi-token prediction, if it has any, are not run. With the payload "hidden"
        its output layer is not run, but for a few test states in one pass of 16, the first among them.
    settings: default `DistillSettings.from_environment()`; the loss fields are not read.
    microbatches: queued requests that go through the pipeline together, so that its stages overlap; fewer when
        fewer are queued. Default: twice the pipeline's stages.
    stay: after a student job's goodbye, or its end without one, wait for the next, until none has come for
        `connect_timeout` seconds. Jobs that do not fit are turned away and do not end it.
    tokenizer: that the model was trained with, to be compared with the student's: Megatron's, Hugging Face's or a
        `vcrd.link.Tokenizer`. Default: that of `megatron.training`, where it runs.
    checkpoint: what people call these weights, for messages. Default: the --load of `megatron.training`.

    The student refuses a teacher whose vocabulary is another one, and one with other weights than the first teacher of
    the run: after a restart, or in another replica (the setting `identity`). For that each rank reads its weights
    once, before it joins.
    Every rank of the job calls it. Each data-parallel rank is a replica of its own. Tensor and pipeline
    parallelism of any size; the students' may differ. No logits are gathered: each rank sends its own columns.
    Raises LinkError, alike on every rank of a replica, when a student is lost or the jobs do not fit, and ValueError
    for a model or micro-batches that cannot be served.
    """
    settings = DistillSettings.from_environment() if settings is None else settings
    chunks = model if isinstance(model, (list, tuple)) else [model]
    if len(chunks) != 1:
        raise ValueError(
            f"model: expected one chunk, for teachers do not interleave stages, got {len(chunks)}"
        )
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"microbatches: expected at least 1, got {microbatches}")
    chunk = unwrap(chunks[0])
    layout = Layout.of(chunk, settings)
    refuse_delayed_scaling(chunk.config)
    output_layer = None
    if settings.link.payload == "hidden" and parallel_state.is_pipeline_last_stage():
        output_layer = OutputLayer(chunk, layout.tensor_group)
    identity = _identity(chunk, layout, tokenizer, checkpoint)
    limit = microbatches or 2 * parallel_state.get_pipeline_model_parallel_world_size()
    served = 0
    training = chunk.training
    serving = Serving(telemetry_of(chunk, settings, "teacher"), layout.data_rank)
    chunk.eval()
    try:
        for link in _links(settings, layout, output_layer, identity, stay):
            try:
                served += _serve_job(chunks[0], link, limit, output_layer, layout.device, serving)
            except StudentLost as error:
                if not stay:
                    raise
                _log.warning("%s", error)
        return served
    finally:
        serving.close()
        chunk.train(training)


def _identity(
    chunk: torch.nn.Module, layout: Layout, tokenizer: Any, checkpoint: str | None
) -> dict[str, Any]:
    """What this rank states of tokenizer and weights; what it does not know it says."""
    found = tokenizer_of(tokenizer)
    if found is None and dist.get_rank() == 0:
        _log.warning("tokenizer: not known in the teacher's job, so it is not compared: pass one to serve()")
    try:
        weights = weights_of(chunk, layout.vocab_size)
    except ValueError as error:
        weights = None
        _log.warning("a teacher that comes back with other weights will not be noticed: %s", error)
    name = checkpoint_name() if checkpoint is None else checkpoint
    return {"tokenizer": found, "weights": weights, "checkpoint": name[-LONGEST_NAME:]}


def _links(
    settings: DistillSettings,
    layout: Layout,
    output_layer: OutputLayer | None,
    identity: dict[str, Any],
    stay: bool,
) -> Iterator[TeacherLink]:
    """One to each student job, of which there is one unless the teacher is to stay."""
    came = False
    while stay or not came:
        try:
            link = _connect(settings, layout, output_layer, identity)
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


def _connect(
    settings: DistillSettings, layout: Layout, output_layer: OutputLayer | None, identity: dict[str, Any]
) -> TeacherLink:
    return TeacherLink.connect(
        settings.link,
        vocab_size=layout.vocab_size,
        padded_vocab_size=layout.padded_vocab_size,
        sequence_length=layout.sequence_length,
        tensor_rank=layout.tensor_rank,
        tensor_size=layout.tensor_size,
        replica=layout.data_rank,
        replicas=layout.data_size,
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        group=parallel_state.get_model_parallel_group(),
        tensor_group=layout.tensor_group,
        head=output_layer.head if output_layer else None,
        head_weight=output_layer.weight if output_layer else None,
        device=layout.device,
        **identity,
    )


def _serve_job(
    model: Any,
    link: TeacherLink,
    limit: int,
    output_layer: OutputLayer | None,
    device: torch.device,
    serving: Serving,
) -> int:
    """Answers one student job until its goodbye; returns how many micro-batches."""
    served = 0
    try:
        serving.begin(link)
        while (requests := link.next_batch(limit)) is not None:
            serving.idled()
            _answer(model, requests, link, output_layer, device)
            served += len(requests)
            serving.answered(len(requests), link)
    finally:
        serving.end()
        link.close()
    _log.info("served %d micro-batches", served)
    serving.say_how_idle()
    return served


@torch.no_grad()
def _answer(
    model: Any,
    requests: list[Request],
    link: TeacherLink,
    output_layer: OutputLayer | None,
    device: torch.device,
) -> None:
    """One pass through the pipeline, forward only, with a micro-batch per request of equal shape."""
    batch, sequence = requests[0].tokens.shape
    refuse_uneven_tokens(unwrap(model).config, batch, sequence)
    inputs = PackedInputs(unwrap(model), device)

    def forward_step(data_iterator: Iterator[Request], model: Any) -> tuple[Tensor, Any]:
        request = next(data_iterator)
        tokens = request.tokens.to(device)
        positions, mask, packed = inputs.of(request)
        with output_layer.captured() if output_layer else contextlib.nullcontext() as states:
            output = model(tokens, positions, mask, **packed)
        return output, partial(_respond, link, request, output_layer, states[-1] if states else None)

    with ExtraHeads(unwrap(model)).off():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(requests),
            model=model,
            num_microbatches=len(requests),
            seq_length=sequence,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _respond(
    link: TeacherLink,
    request: Request,
    output_layer: OutputLayer | None,
    states: Tensor | None,
    output: Tensor,
    non_loss_data: bool = True,
) -> None:
    """Sends what the last stage made of a request, as soon as it is there; the schedule keeps nothing of it.

    output: logits [b, s, v/tp], or anything where states [s, b, hidden size] are what is sent.
    """
    if states is None:
        link.respond(request, output.transpose(0, 1))
        return
    output_layer.check(output.transpose(0, 1))
    link.respond(request, states)
