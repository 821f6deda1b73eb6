"""A student that trains and a teacher that may be killed: what the tests of rejoining, and chaos.py, run."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from link_jobs import Layout, device, true_logits
from patience import wait_shortly

from vcrd.link import LinkSettings, StudentLink, TeacherLink, context_rows, host_rendezvous
from vcrd.link.connection import Connection
from vcrd.link.transport.nccl import Departing, NcclTransport

SEQUENCE, BATCH = 16, 2
_FEATURES = 8


def settings_for(port: int, **changes) -> LinkSettings:
    times = dict.fromkeys(("timeout", "connect_timeout"), 90.0)
    return LinkSettings(**(dict(address=f"127.0.0.1:{port}", payload="float32") | times | changes))


def tokens_of(data_rank: int, number: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * data_rank + number)
    return torch.randint(vocab, (BATCH, SEQUENCE), generator=generator)


class Weights:
    """This rank's columns of a linear model that learns the teacher's logits; the same bits for the same answers."""

    def __init__(self, layout: Layout, rank: int, columns, lockstep: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self._features = torch.randn(layout.vocab, _FEATURES, generator=generator)
        self._weight = torch.randn(layout.vocab, _FEATURES, generator=generator)[
            columns.start : columns.stop
        ].clone()
        self._group = None
        if lockstep:
            for tensor_rank in range(layout.student_tensor):
                ranks = list(range(tensor_rank, layout.students, layout.student_tensor))
                group = dist.new_group(ranks)
                self._group = group if rank in ranks else self._group

    def learn(self, tokens: torch.Tensor, teacher: torch.Tensor) -> None:
        features = self._features[tokens.T]
        difference = features @ self._weight.T - teacher.float()
        gradient = difference.flatten(0, 1).T @ features.flatten(0, 1)
        if self._group is not None:
            # On a GPU over NCCL, like the collectives of a training job.
            shared = gradient.to(device())
            dist.all_reduce(shared, group=self._group)
            gradient = shared.cpu()
        self._weight -= 1e-3 * gradient

    def digest(self) -> str:
        assert self._weight.isfinite().all()
        return hashlib.sha256(self._weight.numpy().tobytes()).hexdigest()


def say_when() -> None:
    """What the link logs goes to the output, with the time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def run_student(
    rank: int,
    layout: Layout,
    settings: LinkSettings,
    steps: int,
    pause: float = 0.0,
    lockstep: bool = True,
    allowed=None,
    stops_at: int = -1,
) -> None:
    """Takes `steps` steps, says how it goes, and the digest of its weights and what it left running.

    lockstep: the ranks share their gradients, and so wait for each other. allowed: a shared number of steps that may be
    taken by now. stops_at: the step at which it stops itself, having just sent a request, until it is continued.
    """
    say_when()
    rendezvous = host_rendezvous(settings) if rank == 0 else None
    place = layout.student(rank)
    data_rank, context = place["data_rank"], (place["context_rank"], place["context_size"])
    link = StudentLink.connect(settings, **place, device=device())
    if layout.patience is not None:
        wait_shortly(link, layout.patience)
    weights = Weights(layout, rank, link.columns, lockstep)
    rows = torch.cat([torch.arange(span.start, span.stop) for span in context_rows(SEQUENCE, *context)])
    asks, asked = place["tensor_rank"] == place["context_rank"] == 0, 0
    for number in range(steps):
        while asks and asked < min(steps, number + settings.credits + 1):
            link.request(tokens_of(data_rank, asked, layout.vocab))
            asked += 1
        logits = link.receive(number).logits.cpu()
        if number == stops_at:
            os.kill(os.getpid(), signal.SIGSTOP)
        tokens = tokens_of(data_rank, number, layout.vocab)
        if settings.payload == "float32":
            truth = true_logits(tokens, layout.vocab)[rows]
            assert torch.equal(logits, truth[..., link.columns.start : link.columns.stop]), number
        weights.learn(tokens[:, rows], logits)
        print(f"step {number}", flush=True)
        time.sleep(pause)
        while allowed is not None and allowed.value <= number + 1 < steps:
            time.sleep(0.01)
    print(f"weights {weights.digest()}", flush=True)
    if lockstep:
        dist.barrier()
    link.close()
    dist.barrier()
    if rendezvous:
        rendezvous.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("vcrd")]
    print(f"threads left: {left}", flush=True)


def run_teacher(
    rank: int, replica: int, layout: Layout, settings: LinkSettings, dies_sending: int = -1
) -> None:
    """Serves until the students part. dies_sending: it kills itself in the middle of sending this response."""
    say_when()
    last = range(layout.pipeline, layout.teachers)
    alone = not dist.is_initialized()
    tensor_group = None if alone else dist.new_group(list(last))
    group = None if alone else dist.group.WORLD
    link = TeacherLink.connect(
        settings,
        **layout.teacher(replica, rank),
        group=group,
        tensor_group=tensor_group,
        device=device(),
    )
    print("serves", flush=True)
    responses = 0
    try:
        while (batch := link.next_batch(limit=2)) is not None:
            for request in batch:
                if responses == dies_sending:
                    die_in_the_middle_of_sending()
                if rank in last:
                    logits = torch.zeros(SEQUENCE, BATCH, layout.teacher_padded)
                    logits[..., : layout.vocab] = true_logits(request.tokens, layout.vocab)
                    mine = logits.chunk(layout.teacher_tensor, -1)[rank - layout.pipeline]
                    link.respond(request, mine.to(device()))
                responses += 1
    finally:
        link.close()
    print("served", flush=True)


def die_in_the_middle_of_sending() -> None:
    send_all = Connection._send_all

    def send_half(connection: Connection, view: memoryview, seconds: float) -> None:
        if len(view) < 1 << 20:
            return send_all(connection, view, seconds)
        send_all(connection, view[: len(view) // 2], seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def send_half_over_nccl(transport: NcclTransport, part: Departing, _: float) -> None:
        transport._communicator.send(part.tensor, transport._stream)
        time.sleep(0.002)  # so that the kill falls into the transfer; the test does not depend on it
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send_all = send_half
    NcclTransport._send = send_half_over_nccl
