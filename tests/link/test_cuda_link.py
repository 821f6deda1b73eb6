"""The link between GPUs: what arrives, that the host waits for nothing, and that memory does not grow.

Collected where there is a GPU. Both ends are in this process, on one device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from link_jobs import Layout, part
from ports import free_port

import vcrd
from vcrd.link import Head, LinkSettings, StudentLink, TeacherLink, host_rendezvous
from vcrd.link.buffers import Upload
from vcrd.link.payload import encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard
from vcrd.link.transport import tcp

PAYLOADS = ["float32", "float16", "logits_8bit", "topk", "hidden"]
TOKENS, VOCAB, SIZE, TOP_K, CREDITS = 64, 2000, 32, 8, 2
LAYOUT = Layout(vocab=VOCAB, sequence=TOKENS)


@contextmanager
def linked(payload: str):
    """A student and a teacher of one rank each, both on the GPU."""
    address = f"127.0.0.1:{free_port()}"
    settings = LinkSettings(address=address, payload=payload, top_k=TOP_K, credits=CREDITS, timeout=60)
    hidden = dict(head=Head(SIZE, "bfloat16"), head_weight=weight()) if payload == "hidden" else {}
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(
            TeacherLink.connect, settings, **LAYOUT.teacher(0, 0), group=None, tensor_group=None, **hidden
        )
        student = StudentLink.connect(settings, **LAYOUT.student(0), device="cuda")
        teacher = coming.result()
    try:
        yield student, teacher
        part(student, teacher)
    finally:
        student.close()
        teacher.close()
        rendezvous.close()


def weight() -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(VOCAB, SIZE, generator=generator, device="cuda").bfloat16()


def output_of(payload: str, number: int) -> torch.Tensor:
    """What the teacher's model gives, different for each micro-batch."""
    generator = torch.Generator("cuda").manual_seed(number)
    states = torch.randn(TOKENS, 1, SIZE, generator=generator, device="cuda")
    return states.bfloat16() if payload == "hidden" else 2 * states @ weight().float().T


def expected_of(payload: str, number: int) -> list[torch.Tensor]:
    """What travels, encoded where the network is not."""
    output = output_of(payload, number)
    if payload == "hidden":
        return [output, weight()]
    if payload == "topk":
        return list(top_k_of(output, TOP_K, Shard(0, VOCAB), None))
    return [encode(payload_named(payload), output, row_max(output))]


def tensors_of(answer) -> list[torch.Tensor]:
    return [each for each in vars(answer).values() if isinstance(each, torch.Tensor)]


def loss_of(student_logits: torch.Tensor, answer) -> torch.Tensor:
    return vcrd.validity_calibrated_kl(student_logits, answer, validity="margin").loss.sum()


def ask(student: StudentLink) -> None:
    student.request(torch.zeros(1, TOKENS, dtype=torch.int64))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_arrives_is_on_the_device_and_is_what_was_sent(payload):
    with linked(payload) as (student, teacher):
        for number in range(5):
            ask(student)
            (request,) = teacher.next_batch(1)
            output = output_of(payload, number)
            teacher.respond(request, output)
            output.fill_(torch.nan)  # the model reuses its buffer at once
            got, expected = tensors_of(student.receive(number)), expected_of(payload, number)
            assert all(one.is_cuda for one in got)
            assert all(torch.equal(*both) for both in zip(got, expected, strict=True))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_host_never_waits_for_the_device(payload):
    with linked(payload) as (student, teacher):
        student_logits = torch.randn(TOKENS, 1, VOCAB, device="cuda").bfloat16().requires_grad_()
        outputs = [output_of(payload, number) for number in range(6)]
        for number, output in enumerate(outputs):
            if number == 1:  # the first time kernels are loaded, and the output layer is put on the device
                torch.cuda.set_sync_debug_mode("error")
            try:
                ask(student)
                (request,) = teacher.next_batch(1)
                teacher.respond(request, output)
                loss_of(student_logits, student.receive(number)).backward()
            finally:
                torch.cuda.set_sync_debug_mode("error" if 0 < number < len(outputs) - 1 else "default")


def test_the_host_goes_on_while_the_answer_is_copied_and_the_computing_stream_waits_for_it(monkeypatch):
    copying = []

    class WatchedUpload(Upload):
        def __init__(self, tensors, memory):
            super().__init__(tensors, memory)
            copying[:] = [memory.stream(memory.device)]

    monkeypatch.setattr(tcp, "Upload", WatchedUpload)
    with linked("float32") as (student, teacher):
        for number in range(2):
            ask(student)
            (request,) = teacher.next_batch(1)
            torch.cuda.synchronize()
            if number:  # once memory is there, whose first allocation may wait for the device
                with torch.cuda.stream(copying[0]):
                    torch.cuda._sleep(2_000_000_000)  # about a second before the copy can begin
            teacher.respond(request, output_of("float32", number))
            answer = student.receive(number)
        assert not copying[0].query(), "receive waited for the copy"
        assert torch.equal(answer.logits, expected_of("float32", 1)[0])


@pytest.mark.parametrize("payload", ["float16", "hidden"])
def test_memory_of_the_device_does_not_grow(payload):
    with linked(payload) as (student, teacher):
        reserved = []
        for number in range(60):
            ask(student)
            (request,) = teacher.next_batch(1)
            teacher.respond(request, output_of(payload, number))
            answer = student.receive(number)
            del answer
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())
        assert reserved[-1] == reserved[20]
