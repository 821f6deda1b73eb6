"""A student and a teacher world that transfer a few micro-batches with every payload, compared with the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from vcrd.link import Head, LinkSettings, Place, StudentLink, TeacherLink, TeacherPlace, host_rendezvous
from vcrd.link.connection import HEADER_BYTES, Connection, Header, Kind
from vcrd.link.payload import payload_named
from vcrd.link.question import Context
from vcrd.plan.traffic import Traffic, request_bytes

SHAPES = [(24, 2), (12, 1), (24, 2)]  # sequence, batch; the context sizes divide half of a sequence
CONTEXTS = [3, 0, 5]  # tokens that only the teacher sees, in front of the first row of each
CREDITS = 2
TOP_K = 3
PAYLOADS = ("float32", "float16", "logits_8bit", "topk", "hidden")


@dataclass(frozen=True)
class Case:
    """Both layouts; before: ranks of a replica ahead of its last stage."""

    vocab: int
    student_tensor: int = 1
    student_padded: int = 0
    context: int = 1
    data: int = 1
    teacher_tensor: int = 1
    teacher_padded: int = 0
    before: int = 0
    replicas: int = 1
    state_size: int = 8
    state_dtype: str = "bfloat16"

    @property
    def students(self) -> int:
        return self.student_tensor * self.context * self.data

    @property
    def teachers(self) -> int:
        return self.before + self.teacher_tensor

    @property
    def head(self) -> Head:
        return Head(self.state_size, self.state_dtype)

    def traffic(self, payload: str) -> Traffic:
        sized = payload_named(payload).sized(
            top_k=TOP_K, state_size=self.state_size, state_dtype=getattr(torch, self.state_dtype)
        )
        return Traffic(
            payload=sized,
            vocab_size=self.vocab,
            teacher_padded=self.teacher_padded,
            teacher_tensor=self.teacher_tensor,
            student_padded=self.student_padded,
            student_tensor=self.student_tensor,
            context_size=self.context,
            data_size=self.data,
        )


def settings_for(port: int, payload: str) -> LinkSettings:
    return LinkSettings(
        address=f"127.0.0.1:{port}",
        name=payload,
        payload=payload,
        top_k=TOP_K,
        credits=CREDITS,
        timeout=60,
        connect_timeout=60,
        teacher_context_length=max(CONTEXTS),
    )


def count_requests() -> list[int]:
    """The bytes of each request that this process sends from now on."""
    sent, send = [], Connection.send

    def counted(self: Connection, header: Header, *parts, **how) -> None:
        if header.kind == Kind.REQUEST:
            sent.append(HEADER_BYTES + sum(part.nbytes for part in parts))
        send(self, header, *parts, **how)

    Connection.send = counted
    return sent


def run_student(rank: int, case: Case, port: int) -> None:
    sent = count_requests()
    rendezvous = host_rendezvous(settings_for(port, PAYLOADS[0])) if rank == 0 else None
    tensor, others = rank % case.student_tensor, rank // case.student_tensor
    place = Place(others // case.context, others % case.context, tensor)
    for payload in PAYLOADS:
        link = StudentLink.connect(
            settings_for(port, payload),
            vocab_size=case.vocab,
            padded_vocab_size=case.student_padded,
            sequence_length=24,
            tensor_rank=place.tensor,
            tensor_size=case.student_tensor,
            data_rank=place.data,
            data_size=case.data,
            context_rank=place.context,
            context_size=case.context,
        )
        asked = list(zip(SHAPES, CONTEXTS, strict=True)) if place.is_request_leader else []
        for (sequence, batch), count in asked:
            context = Context(*torch.zeros(2, count, dtype=torch.long))
            link.request(torch.zeros(batch, sequence, dtype=torch.long), context=context)
        for number in range(len(SHAPES)):
            link.receive(number)
        planned = case.traffic(payload).received_by(place, SHAPES)
        assert link.bytes_received == planned, f"{payload}: {link.bytes_received}, planned {planned}"
        assert sent == [request_bytes(shape, context=count) for shape, count in asked]
        sent.clear()
        print(f"{payload} {planned}", flush=True)
        dist.barrier()
        link.close()
    dist.barrier()
    if rendezvous:
        rendezvous.close()


def run_teacher(rank: int, replica: int, case: Case, port: int) -> None:
    last = range(case.before, case.teachers)
    group = dist.new_group(list(last))
    tensor = rank - case.before if rank in last else 0
    rows = case.teacher_padded // case.teacher_tensor
    for payload in PAYLOADS:
        hidden = payload == "hidden"
        link = TeacherLink.connect(
            settings_for(port, payload),
            vocab_size=case.vocab,
            padded_vocab_size=case.teacher_padded,
            sequence_length=24,
            place=TeacherPlace(replica, case.replicas, tensor, case.teacher_tensor, rank in last),
            group=dist.group.WORLD,
            tensor_group=group if rank in last and case.teacher_tensor > 1 else None,
            head=case.head if hidden else None,
            head_weight=torch.ones(rows, case.state_size, dtype=getattr(torch, case.state_dtype))
            if hidden and rank in last
            else None,
        )
        while (requests := link.next_batch(limit=3)) is not None:
            for request in requests if rank in last else ():
                batch, sequence = request.tokens.shape
                link.respond(request, torch.randn(sequence, batch, case.state_size if hidden else rows))
        if rank in last:
            compare(link, case, payload, tensor, replica)
        link.close()


def compare(link: TeacherLink, case: Case, payload: str, tensor: int, replica: int) -> None:
    planned = case.traffic(payload).sent_by(tensor, replica, case.replicas, SHAPES)
    session = link._sessions[0]
    # Every student has left the first rank of the teacher. This rank closes its receivers about now.
    goodbyes = HEADER_BYTES * len(session.receivers)
    link.close()
    assert session.responses.bytes_sent == planned + goodbyes, (
        f"{payload}: {session.responses.bytes_sent - goodbyes}, planned {planned}"
    )
    print(f"{payload} {planned}", flush=True)
