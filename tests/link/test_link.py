"""The link between real processes: each student rank receives exactly its columns of the teacher's logits."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from link_jobs import Jobs, Layout, connected, device, exchange, part, true_logits
from ports import free_port

from vcrd.link import LinkSettings, StudentLink, TeacherLink, TeacherPlace, handshake, host_rendezvous
from vcrd.link.connection import HEADER_BYTES, Connection
from vcrd.link.payload import payload_named

# Different shapes in turn, so that batches of equal shape have to be sorted out; batch 3, 16 is the longest.
SHAPES = [(2, 16), (2, 16), (3, 16), (1, 5), (2, 16), (2, 16), (1, 1), (1, 5)]

GRIDS = {
    "one to one": Layout(vocab=7),
    "student wider": Layout(
        student_tensor=3, teacher_tensor=2, vocab=50, student_padded=51, teacher_padded=64
    ),
    "teacher wider": Layout(student_tensor=2, teacher_tensor=3, pipeline=1, vocab=101, student_padded=256),
    "replicas": Layout(student_tensor=2, student_data=3, teacher_tensor=1, pipeline=1, replicas=2, vocab=33),
    "empty shards": Layout(student_tensor=4, teacher_tensor=4, vocab=5, student_padded=12, teacher_padded=8),
}


def micro_batch(layout: Layout, data_rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * data_rank + number)
    return torch.randint(layout.vocab, SHAPES[number % len(SHAPES)], generator=generator)


def settings_of(layout: Layout, port: int, name: str) -> LinkSettings:
    return LinkSettings(
        address=f"127.0.0.1:{port}", name=name, timeout=60, connect_timeout=60, **layout.settings
    )


def run_student(rank: int, layout: Layout, port: int, runs: list[tuple[str, dict]]) -> None:
    rendezvous = host_rendezvous(settings_of(layout, port, "x")) if rank == 0 else None
    for name, extra in runs:
        settings = settings_of(layout, port, name)
        settings = LinkSettings(**{**vars(settings), **extra})
        link = StudentLink.connect(settings, **layout.student(rank), device=device())
        receive_all(link, layout, settings, layout.student(rank)["data_rank"])
        link.close()
        link.close()
    dist.barrier()
    if rendezvous:
        rendezvous.close()


def receive_all(link: StudentLink, layout: Layout, settings: LinkSettings, data_rank: int) -> None:
    count, ahead, asks, moved = 11, settings.credits + 2, link._place.is_request_leader, 0
    beside = torch.ones(1 << 18, device=device())
    for number in range(count):
        while asks and link._connections.requested < min(count, number + ahead):
            link.request(micro_batch(layout, data_rank, link._connections.requested))
        # As the collectives of a tensor-parallel student run while answers arrive.
        work = dist.all_reduce(beside, async_op=True)
        logits = link.receive(number).logits.cpu()
        work.wait()
        check(logits, micro_batch(layout, data_rank, number), layout, link.columns, settings.payload)
        moved += logits.numel() * logits.element_size()
    senders = len(link._connections.session.expected)
    # A header a piece, and READY.
    assert link.bytes_received == moved + HEADER_BYTES * (senders * count + asks)
    assert 0 < link.waits.seconds
    assert (beside == float(layout.students) ** count).all()
    dist.barrier()
    if asks:  # what was asked for and is never received must not keep anyone from parting
        link.request(micro_batch(layout, data_rank, count))


def check(logits: torch.Tensor, tokens: torch.Tensor, layout: Layout, columns, payload: str) -> None:
    truth = true_logits(tokens, layout.vocab)
    wanted = truth[..., columns.start : columns.stop]
    assert logits.shape == wanted.shape
    assert logits.dtype == payload_named(payload).dtype
    if payload == "float32":
        assert torch.equal(logits, wanted)
        return
    distance = wanted - truth.amax(-1, keepdim=True)
    if payload == "logits_8bit":
        got = -24 * (logits.double() / 255) ** 2
        distance = distance.clamp(min=-24)
        assert ((got - distance).abs() <= 0.0193 * distance.abs().sqrt() + 1e-4).all()
        return
    # float16 has 11 significant bits.
    assert ((logits.float() - distance).abs() <= distance.abs() * 2**-11 + 2**-25).all()


def run_teacher(rank: int, replica: int, layout: Layout, port: int, runs: list[tuple[str, dict]]) -> None:
    last = range(layout.pipeline, layout.teachers)
    tensor_group = dist.new_group(list(last))
    for name, extra in runs:
        settings = settings_of(layout, port, name)
        settings = LinkSettings(**{**vars(settings), **extra})
        link = TeacherLink.connect(
            settings,
            **layout.teacher(replica, rank),
            group=dist.group.WORLD,
            tensor_group=tensor_group if rank in last and layout.teacher_tensor > 1 else None,
            device=device(),
        )
        while (batch := link.next_batch(limit=3)) is not None:
            assert 1 <= len(batch) <= 3
            assert len({request.tokens.shape for request in batch}) == 1
            for request in batch:
                assert torch.equal(request.tokens, micro_batch(layout, request.data_rank, request.number))
                if rank in last:
                    link.respond(
                        request, shard_of(request.tokens, layout, rank - layout.pipeline).to(device())
                    )
        link.close()
        link.close()


def shard_of(tokens: torch.Tensor, layout: Layout, tensor_rank: int) -> torch.Tensor:
    """The padded columns of a tensor rank; padding holds what would be the maximum if it counted."""
    logits = torch.full((*tokens.T.shape, layout.teacher_padded), 1e4)
    logits[..., : layout.vocab] = true_logits(tokens, layout.vocab)
    return logits.chunk(layout.teacher_tensor, -1)[tensor_rank]


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("grid", GRIDS)
def test_each_student_rank_receives_its_columns(grid, tmp_path):
    layout, port = GRIDS[grid], free_port()
    runs = [
        ("exact", {"payload": "float32", "credits": 1}),
        ("half", {"payload": "float16", "credits": 3}),
        ("byte", {"payload": "logits_8bit", "credits": 2}),
    ]
    with Jobs(tmp_path) as jobs:
        jobs.world("student", layout.students, run_student, layout, port, runs)
        for replica in range(layout.replicas):
            jobs.world(f"teacher{replica}.", layout.teachers, run_teacher, replica, layout, port, runs)
        jobs.succeed()


@pytest.mark.usefixtures("each_transport_in_one_process")
def test_credits_bound_what_is_asked_ahead():
    settings = LinkSettings(address=f"127.0.0.1:{free_port()}", credits=2, timeout=30)
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    for _ in range(5):
        student.request(torch.zeros(1, 4, dtype=torch.long))
    for number in range(5):
        # Two are with the teacher or answered, besides those that have been received.
        assert student._connections._sent == min(number + 2, 5)
        if number == 0:
            answer(teacher, 2)
        elif number < 4:
            answer(teacher, 1)
        student.receive(number)
    part(student, teacher)
    rendezvous.close()


def answer(teacher: TeacherLink, count: int) -> None:
    while count:
        for request in teacher.next_batch(count):
            teacher.respond(request, torch.zeros(4, 1, Layout().teacher_padded))
            count -= 1


def test_an_answer_that_keeps_arriving_is_waited_for(monkeypatch):
    """For longer than the time-out, which counts from the last sign of life."""
    send_all = Connection._send_all

    def trickle(self, view, seconds):
        for begin in range(0, len(view), 80):
            time.sleep(0.5 if len(view) > HEADER_BYTES else 0.0)  # headers go out at once
            send_all(self, view[begin : begin + 80], seconds)

    settings = LinkSettings(address=f"127.0.0.1:{free_port()}", timeout=2.0)
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    monkeypatch.setattr(Connection, "_send_all", trickle)
    exchange(student, teacher, 0)  # 400 bytes
    assert student._connections.session.epoch == 1
    monkeypatch.undo()
    part(student, teacher)
    rendezvous.close()


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
def test_wrong_arguments_are_named_and_leave_the_link_usable(monkeypatch):
    settings = LinkSettings(address=f"127.0.0.1:{free_port()}", timeout=30)
    monkeypatch.setattr(handshake, "MOST_TOKENS", 32)
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    for tokens, reason in [
        (torch.zeros(4, dtype=torch.long), "expected a non-empty integer tensor"),
        (torch.zeros(1, 4), "expected a non-empty integer tensor"),
        (torch.zeros(1, 17, dtype=torch.long), "expected rows of at most 16 and 32 in all"),
        (torch.zeros(3, 16, dtype=torch.long), "expected rows of at most 16 and 32 in all"),
        (torch.full((1, 4), 50), r"expected integers in \[0, 50\), got 50 to 50"),
        (torch.full((1, 4), -1), r"expected integers in \[0, 50\), got -1 to -1"),
    ]:
        with pytest.raises(ValueError, match=f"tokens: {reason}"):
            student.request(tokens)
    for rows, edges, reason in [
        (2, [0, 4], "expected one row of packed sequences, got 2 rows"),
        (1, [0, 5], r"expected ascending edges from 0 to 4, got \[0, 5\]"),
        (1, [0, 3, 2, 4], "expected ascending edges from 0 to 4"),
        (1, [0, 4 + (1 << 32)], "expected ascending edges from 0 to 4"),
        (1, [0.0, 4.0], "expected integers, got torch.float32"),
        (1, [0, 0, 0, 0, 0, 4], "expected at most 5 edges for 4 tokens, got 6"),
    ]:
        with pytest.raises(ValueError, match=f"boundaries: {reason}"):
            student.request(torch.zeros(rows, 4, dtype=torch.long), edges)
    with pytest.raises(
        ValueError, match="boundaries: expected sequences of at most 16 tokens, got one of 17"
    ):
        student.request(torch.zeros(1, 20, dtype=torch.long), [0, 17, 20])
    with pytest.raises(ValueError, match="number: expected one that was requested"):
        student.receive(0)
    with pytest.raises(ValueError, match="number: expected the next one, 0, got 1"):
        student.receive(1)
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        teacher.next_batch(0)
    student.request(torch.zeros(2, 4, dtype=torch.long))
    (request,) = teacher.next_batch(1)
    for logits in (torch.zeros(2, 4, 50), torch.zeros(4, 2, 50, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"logits: expected a float tensor \[4, 2, 50\]"):
            teacher.respond(request, logits)
    teacher.respond(request, torch.zeros(4, 2, 50))
    assert student.receive(0).logits.shape == (4, 2, 50)
    # Of packed sequences each is as long as a sequence may be, not the row.
    student.request(torch.zeros(1, 32, dtype=torch.long), [0, 16, 32])
    (request,) = teacher.next_batch(1)
    teacher.respond(request, torch.zeros(32, 1, 50))
    assert student.receive(1).logits.shape == (32, 1, 50)
    exchange(student, teacher, 2)
    part(student, teacher)
    rendezvous.close()


def test_wrong_places_are_named():
    places = Layout().student(0)
    with pytest.raises(ValueError, match=r"tensor_rank: expected an integer in \[0, 1\), got 1"):
        StudentLink.connect(LinkSettings(), **(places | {"tensor_rank": 1}))
    with pytest.raises(ValueError, match=r"data_rank: expected an integer in \[0, 1\), got -1"):
        StudentLink.connect(LinkSettings(), **(places | {"data_rank": -1}))
    places = Layout().teacher(0, 0) | {"group": None, "tensor_group": None}
    with pytest.raises(ValueError, match=r"replica: expected an integer in \[0, 1\), got 1"):
        TeacherPlace(replica=1)
    with pytest.raises(ValueError, match="tensor_group: expected a group for tensor_size 2"):
        TeacherLink.connect(LinkSettings(), **(places | {"place": TeacherPlace(tensor_size=2)}))
    with pytest.raises(ValueError, match=r"each tensor rank of the last stage once, got tensor ranks \[\]"):
        TeacherLink.connect(LinkSettings(), **(places | {"place": TeacherPlace(is_last_stage=False)}))
