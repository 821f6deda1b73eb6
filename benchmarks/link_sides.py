"""The student process and the teacher process of link.py. Each receives its commands over a pipe.

Both do the same work per micro-batch, so the teacher is as fast as the student: the loss, forward and backward, and
matrix products in place of a model. The work of the link comes in addition, on the same core.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

import vcrd
from vcrd.link import Head, LinkSettings, StudentLink, TeacherLink, TeacherPlace, host_rendezvous
from vcrd.link.connection import HEADER_BYTES
from vcrd.link.payload import encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard
from vcrd.link.tracing import trace

SIDE = 1024  # rows and columns of the square matrices whose products replace a model


@dataclass(frozen=True)
class Work:
    """The work of both processes: sizes of a micro-batch, settings of the link. ports: by payload, and "bare"."""

    tokens: int
    vocab: int
    matmuls: int
    state_size: int
    top_k: int
    credits: int
    sockets: int = 1
    ports: dict[str, int] = field(default_factory=dict)
    trace_folder: Path | None = None

    def settings(self, payload: str) -> LinkSettings:
        return LinkSettings(
            address=f"127.0.0.1:{self.ports[payload]}",
            payload=payload,
            top_k=self.top_k,
            credits=self.credits,
            sockets=self.sockets,
            name=payload,
        )

    def bytes(self, payload: str) -> int:
        """Bytes of one response on the wire."""
        content = payload_named(payload).sized(
            top_k=self.top_k, state_size=self.state_size, state_dtype=torch.bfloat16
        )
        return HEADER_BYTES + content.bytes(self.tokens, self.vocab)


class Answers:
    """The teacher's answer to the one micro-batch that is requested repeatedly, in every form."""

    def __init__(self, work: Work) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(work.vocab, work.state_size, generator=generator).bfloat16()
        self.states = torch.randn(work.tokens, 1, work.state_size, generator=generator) / work.state_size**0.5
        self.states = 3 * self.states.bfloat16()
        self.logits = self.states.float() @ self.head.float().T
        self._work = work
        self._factor = self.head.float()  # the dtype of the product in the loss on the CPU, converted once

    def output(self, payload: str) -> Tensor:
        """The output of the teacher model for the link."""
        return self.states if payload == "hidden" else self.logits

    def ready(self, payload: str) -> object:
        """What the link would return, in separate memory."""
        if payload == "hidden":
            return vcrd.HiddenStates(self.states.clone(), self._factor)
        if payload == "topk":
            shard = Shard(0, self._work.vocab)
            return vcrd.TopKLogits(*top_k_of(self.logits, self._work.top_k, shard, None))
        return encode(payload_named(payload), self.logits, row_max(self.logits))


class Model:
    """The work of one micro-batch."""

    def __init__(self, work: Work) -> None:
        generator = torch.Generator().manual_seed(1)
        self._logits = (3 * torch.randn(work.tokens, 1, work.vocab, generator=generator)).bfloat16()
        self._logits.requires_grad_()
        self._labels = torch.randint(work.vocab, (work.tokens, 1), generator=generator)
        self._matrix = torch.randn(SIDE, SIDE, generator=generator)
        self._product = torch.empty(SIDE, SIDE)
        self._matmuls = work.matmuls

    def step(self, teacher: object) -> None:
        for _ in range(self._matmuls):
            torch.mm(self._matrix, self._matrix, out=self._product)
        loss = vcrd.validity_calibrated_kl(self._logits, teacher, self._labels).loss
        torch.autograd.grad(loss.mean(), self._logits)


class _Side:
    """The common part of both processes: the commands of link.py, and their CPU time."""

    def __init__(self, work: Work, core: int) -> None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        self._core = core
        self._work = work
        self._answers = Answers(work)
        self._model = Model(work)
        self._ready: dict[str, list] = {}

    def run(self, pipe: Connection) -> None:
        pipe.send("here")
        while (command := pipe.recv()) is not None:
            name, *arguments = command
            pipe.send(getattr(self, name)(*arguments))

    def prepare(self, payload: str) -> None:
        """Two answers, alternating, because a run reads no answer twice."""
        self._ready[payload] = [self._answers.ready(payload) for _ in range(2)]

    def forget(self, payload: str) -> None:
        del self._ready[payload]

    def free(self, cores: list[int]) -> None:
        """Allows every thread to run on any of these cores."""
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)

    def pin(self) -> None:
        self.free([self._core])

    def ready(self, payload: str, steps: int) -> dict:
        """Runs steps with the answers in memory."""
        held = self._ready[payload]

        def step(number: int) -> None:
            with record_function(f"compute {number}"):
                self._model.step(held[number % 2])

        return timed(step, steps)


class Student(_Side):
    def __init__(self, work: Work, core: int) -> None:
        super().__init__(work, core)
        self._links: dict[str, StudentLink] = {}
        self._rendezvous: dict[str, object] = {}
        self._asked: dict[str, int] = {}
        self._tokens = torch.randint(work.vocab, (1, work.tokens))

    def connect(self, payload: str) -> None:
        settings = self._work.settings(payload)
        self._rendezvous[payload] = host_rendezvous(settings)
        sizes = dict(vocab_size=self._work.vocab, padded_vocab_size=self._work.vocab)
        place = dict(tensor_rank=0, tensor_size=1, data_rank=0, data_size=1)
        link = StudentLink.connect(settings, **sizes, **place, sequence_length=self._work.tokens)
        self._links[payload], self._asked[payload] = link, 0

    def disconnect(self, payload: str) -> None:
        self._links.pop(payload).close()
        self._rendezvous.pop(payload).close()

    def linked(self, payload: str, steps: int, compute: bool) -> dict:
        """Runs steps with answers over the link, with `credits` prefetched micro-batches."""
        link, first = self._links[payload], self._asked[payload]
        waited = [link.waits.seconds]

        def step(number: int) -> None:
            while self._asked[payload] <= min(first + number + self._work.credits, first + steps - 1):
                self._asked[payload] = link.request(self._tokens) + 1
            answer = link.receive(first + number)
            if compute:
                with record_function(f"compute {number}"):
                    self._model.step(answer)
            waited.append(link.waits.seconds)

        return {**timed(step, steps), "waited": waited}

    def traced(self, payload: str, steps: int) -> dict:
        with trace(self._work.trace_folder / "student.json"):
            return self.linked(payload, steps, True)

    def bare_listen(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0))
        return self._listener.getsockname()[1]

    def bare_accept(self) -> None:
        self._sockets = [self._listener.accept()[0] for _ in range(self._work.sockets)]
        self._listener.close()

    def bare(self, count: int, times: int) -> dict:
        """Receives the bytes repeatedly, into existing memory."""

        def receive(sock: socket.socket, left: memoryview) -> None:
            while left:
                left = left[sock.recv_into(left) :]

        return timed(side_by_side(receive, self._sockets, memoryview(bytearray(count))), times)


class Teacher(_Side):
    def __init__(self, work: Work, core: int) -> None:
        super().__init__(work, core)
        self._links: dict[str, TeacherLink] = {}

    def connect(self, payload: str) -> None:
        hidden = payload == "hidden"
        self._links[payload] = TeacherLink.connect(
            self._work.settings(payload),
            vocab_size=self._work.vocab,
            padded_vocab_size=self._work.vocab,
            sequence_length=self._work.tokens,
            place=TeacherPlace(),
            group=None,
            tensor_group=None,
            head=Head(self._work.state_size, "bfloat16") if hidden else None,
            head_weight=self._answers.head if hidden else None,
        )

    def disconnect(self, payload: str) -> None:
        link = self._links.pop(payload)
        assert link.next_batch(1) is None
        link.close()

    def linked(self, payload: str, steps: int, compute: bool) -> dict:
        link, output = self._links[payload], self._answers.output(payload)

        def step(number: int) -> None:
            (request,) = link.next_batch(1)
            if compute:
                with record_function(f"compute {number}"):
                    self._model.step(self._ready[payload][number % 2])
            link.respond(request, output)

        return timed(step, steps)

    def traced(self, payload: str, steps: int) -> dict:
        with trace(self._work.trace_folder / "teacher.json"):
            return self.linked(payload, steps, True)

    def bare_dial(self, port: int) -> None:
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(self._work.sockets)]
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def bare(self, count: int, times: int) -> dict:
        memory = memoryview(bytearray(os.urandom(1 << 16)) * (count // (1 << 16) + 1))[:count]
        return timed(side_by_side(socket.socket.sendall, self._sockets, memory), times)


def side_by_side(
    move: Callable[[socket.socket, memoryview], object], sockets: list[socket.socket], memory: memoryview
) -> Callable[[int], None]:
    """A step that transfers equal parts of the memory over the sockets, the first part in this thread."""
    edges = [part * len(memory) // len(sockets) for part in range(len(sockets) + 1)]
    parts = [memory[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    threads = ThreadPoolExecutor(max(1, len(sockets) - 1))

    def step(_: int) -> None:
        others = [threads.submit(move, *each) for each in zip(sockets[1:], parts[1:], strict=True)]
        move(sockets[0], parts[0])
        for each in others:
            each.result()

    return step


def timed(step: Callable[[int], None], steps: int) -> dict:
    """marks: steps + 1 times in seconds. cpu: CPU seconds per step over all threads of the process."""
    cpu, marks = time.process_time(), [time.perf_counter()]
    for number in range(steps):
        step(number)
        marks.append(time.perf_counter())
    return {"marks": marks, "cpu": (time.process_time() - cpu) / steps}


def run(side: type[_Side], work: Work, core: int, pipe: Connection) -> None:
    """Runs one process until its last command."""
    with nullcontext(pipe):
        side(work, core).run(pipe)
