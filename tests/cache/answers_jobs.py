"""Two jobs for the tests of cached answers: a student that fills a cache from a teacher job, and one of another layout
that trains from it, with other micro-batches of the same sequences in another order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import draw
import torch
import torch.distributed as dist
from draw import Drawn
from link_jobs import Jobs, Layout
from ports import free_port
from torch import Tensor

from vcrd.cache.answers import CachedAnswers
from vcrd.cache.sequences import parts_of
from vcrd.link import LinkSettings, StudentLink, TeacherLink, host_rendezvous
from vcrd.link.handshake import Identity
from vcrd.link.payload import STATE_DTYPES
from vcrd.link.rendezvous import Rendezvous
from vcrd.settings import TeacherSource
from vcrd.teacher_logits import TeacherLogits

IDENTITY = Identity(weights=5, checkpoint="a teacher")


@dataclass
class Case:
    """A layout that fills the cache with the micro-batches of each data rank, and one that reads others from it."""

    filling: Drawn
    reading: Drawn
    filled: list[list[MicroBatch]]
    read: list[list[MicroBatch]]


@dataclass
class MicroBatch:
    tokens: Tensor
    edges: list[int]


def draw_case(dice: random.Random, payload: str) -> Case:
    filling = draw.draw(dice, payload)
    layout = filling.layout
    filled = [_drawn(dice, filling) for _ in range(layout.student_data)]
    pool = [
        batch.tokens[part.row, part.start : part.stop]
        for batches in filled
        for batch in batches
        for part in parts_of(*batch.tokens.shape, batch.edges)
    ]
    context = dice.choice([size for size in (1, 1, 2, 3) if any(fits(each, size) for each in pool)])
    pool = [each for each in pool if fits(each, context)]
    other = Layout(
        student_tensor=dice.randint(1, draw.MOST_RANKS // context),
        student_context=context,
        student_data=1,
        teacher_tensor=layout.teacher_tensor,
        vocab=layout.vocab,
        pipeline=layout.pipeline,
        replicas=1,
    )
    other.student_data = dice.randint(1, draw.MOST_RANKS // (context * other.student_tensor))
    read = [_regrouped(dice, pool, dice.randint(4, 7)) for _ in range(other.student_data)]
    batches = [batch for each in read for batch in each]
    other.sequence = max(batch.tokens.shape[1] for batch in batches)
    return Case(filling, replace(filling, layout=other, credits=dice.randint(0, 3)), filled, read)


def fits(tokens: Tensor, context: int) -> bool:
    return context == 1 or len(tokens) % (2 * context) == 0


def _drawn(dice: random.Random, drawn: Drawn) -> list[MicroBatch]:
    """Micro-batches of the drawn shapes, of which some sequences occur twice."""
    generator = torch.Generator().manual_seed(dice.randint(0, 1 << 30))
    found = [
        MicroBatch(
            torch.randint(drawn.layout.vocab, (batch.rows, batch.sequence), generator=generator),
            list(batch.edges),
        )
        for batch in drawn.batches
    ]
    return [*found, dice.choice(found)]


def _regrouped(dice: random.Random, pool: list[Tensor], count: int) -> list[MicroBatch]:
    """Micro-batches of sequences of the pool: rows of equal length, or packed into one row."""
    found = []
    for _ in range(count):
        first = dice.choice(pool)
        if dice.random() < 0.5:
            alike = [each for each in pool if len(each) == len(first)]
            rows = [first, *(dice.choice(alike) for _ in range(dice.randint(0, 2)))]
            found.append(MicroBatch(torch.stack(rows), []))
        else:
            row = [first, *(dice.choice(pool) for _ in range(dice.randint(0, 3)))]
            edges = torch.tensor([0, *(len(each) for each in row)]).cumsum(0).tolist()
            if edges[-1] > len(edges):  # a sequence without tokens
                place = dice.randrange(len(edges))
                edges.insert(place, edges[place])
            found.append(MicroBatch(torch.cat(row)[None], edges))
    return found


# The teacher: its answer to a sequence is a function of the tokens of the sequence.


def output_for(tokens: Tensor, edges: Sequence[int], drawn: Drawn) -> Tensor:
    """States [s, b, size], or logits [s, b, vocab], of the teacher's dtype."""
    width, dtype = drawn.layout.vocab, draw.DTYPES[drawn.dtype]
    if drawn.head:
        width, dtype = drawn.head.size, STATE_DTYPES[drawn.head.dtype]
    output = torch.empty(*tokens.T.shape, width, dtype=dtype)
    for part in parts_of(*tokens.shape, edges):
        own = tokens[part.row, part.start : part.stop].long()
        seed = int((own * torch.arange(1, len(own) + 1) * 7919).sum()) + 31 * len(own)
        made = torch.randn(len(own), width, generator=torch.Generator().manual_seed(seed))
        output[part.start : part.stop, part.row] = (made if drawn.head else 5 * made).to(dtype)
    return output


def serve(drawn: Drawn, settings: LinkSettings, replica: int, rank: int, group, tensor_group) -> None:
    given = drawn.layout.teacher(replica, rank)
    place = given["place"]
    head = dict(head=drawn.head, head_weight=draw.head_rows(drawn, given)) if place.is_last_stage else {}
    link = TeacherLink.connect(
        settings,
        **given,
        group=group,
        tensor_group=tensor_group if place.is_last_stage and place.tensor_size > 1 else None,
        **head,
        identity=IDENTITY if rank == 0 else Identity(weights=0),
    )
    while (batch := link.next_batch(drawn.limit)) is not None:
        for request in batch:
            if not place.is_last_stage:
                continue
            output = output_for(request.tokens, request.boundaries.tolist(), drawn)
            if not drawn.head:
                full = output.new_full((*output.shape[:-1], given["padded_vocab_size"]), 1e4)
                full[..., : drawn.layout.vocab] = output
                output = full.chunk(place.tensor_size, -1)[place.tensor_rank].clone()
            link.respond(request, output)
    link.close()


def run_teachers(rank: int, port: int, cases: Sequence[Case]) -> None:
    everyone = dist.new_group(timeout=draw.PATIENCE)
    for index, case in enumerate(cases):
        for name, drawn in (("filling", case.filling), ("live", case.reading)):
            layout, mine = drawn.layout, None
            for replica in range(layout.replicas):
                ranks = [replica * layout.teachers + each for each in range(layout.teachers)]
                groups = dist.new_group(ranks), dist.new_group(ranks[layout.pipeline :])
                if rank in ranks:
                    mine = (replica, rank - ranks[0], *groups)
            if mine:
                serve(drawn, drawn.settings(port, f"{name} {index}"), *mine)
    dist.barrier(everyone)


# The students.


def replica_group(layout: Layout) -> dist.ProcessGroup | None:
    """This rank's group of a layout over the first ranks of the world; None for a rank that it does not have."""
    size, mine = layout.student_tensor * layout.student_context, None
    for data_rank in range(layout.student_data):
        ranks = range(data_rank * size, (data_rank + 1) * size)
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    return mine


def train(
    link: StudentLink | CachedAnswers, batches: Sequence[MicroBatch], credits: int
) -> list[list[Tensor | float | None]]:
    """The fields of each answer. Asks ahead as the plug does."""
    found, asked = [], 0
    for number in range(len(batches)):
        while link._place.is_request_leader and asked < min(len(batches), number + credits + 1):
            assert link.request(batches[asked].tokens, batches[asked].edges) == asked
            asked += 1
        found.append(plain(link.receive(number)))
    return found


def plain(answer: TeacherLogits) -> list[Any]:
    """The fields of an answer, its tensors copied."""
    values = [getattr(answer, field.name) for field in fields(answer)]
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def same(some: list[Any], others: list[Any]) -> bool:
    """Whether two answers are equal in every bit."""
    return len(some) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(some, others, strict=True)
    )


def run_students(rank: int, port: int, folder: Path, cases: Sequence[Case]) -> None:
    everyone = dist.new_group(timeout=draw.PATIENCE)
    rendezvous: Rendezvous | None = None
    if rank == 0:
        rendezvous = host_rendezvous(cases[0].filling.settings(port, "x"))
    for index, case in enumerate(cases):
        cache = str(folder / str(index))
        groups = [replica_group(drawn.layout) for drawn in (case.filling, case.reading)]
        if groups[0] is not None:
            _fill(case, index, port, cache, rank, groups[0])
        dist.barrier(everyone)
        if groups[1] is not None:
            _compare(case, index, port, cache, rank, groups[1])
        dist.barrier(everyone)
    if rendezvous:
        rendezvous.close()


def _fill(case: Case, index: int, port: int, cache: str, rank: int, group: dist.ProcessGroup) -> None:
    drawn = case.filling
    settings, place = drawn.settings(port, f"filling {index}"), drawn.layout.student(rank)
    source = TeacherSource("", settings.address, cache)
    answers = CachedAnswers.connect(settings, source, group=group, **place)
    train(answers, case.filled[place["data_rank"]], drawn.credits)
    answers.close()


def _compare(case: Case, index: int, port: int, cache: str, rank: int, group: dist.ProcessGroup) -> None:
    drawn = case.reading
    settings, place = drawn.settings(port, f"live {index}"), drawn.layout.student(rank)
    batches = case.read[place["data_rank"]]
    print(f"{index}: filled by {case.filling}, read by {drawn}", flush=True)
    answers = CachedAnswers.connect(
        replace(settings, address=None), TeacherSource("", None, cache), group=group, **place
    )
    found = train(answers, batches, drawn.credits)
    received, width = answers.bytes_received, answers.columns.width
    answers.close()
    link = StudentLink.connect(settings, **place)
    wanted = train(link, batches, drawn.credits)
    link.close()
    for number, (got, live) in enumerate(zip(found, wanted, strict=True)):
        assert same(got, live), f"micro-batch {number}: {got} is not {live}"
    payload = link.teacher.content()
    tokens = sum(batch.tokens.numel() for batch in batches) // place["context_size"]
    assert received == payload.bytes(tokens, width)


def run(cases: Sequence[Case], folder: Path, seconds: float = 200) -> None:
    port = free_port()
    students = max(drawn.layout.students for case in cases for drawn in (case.filling, case.reading))
    layouts = [drawn.layout for case in cases for drawn in (case.filling, case.reading)]
    with Jobs(folder) as jobs:
        jobs.world("student", students, run_students, port, folder / "caches", cases)
        most = max(layout.teachers * layout.replicas for layout in layouts)
        jobs.world("teacher", most, run_teachers, port, cases)
        deadline = time.monotonic() + seconds
        while any(process.exitcode is None for process in jobs.processes.values()):
            if any(process.exitcode for process in jobs.processes.values()) or time.monotonic() > deadline:
                break  # the others would wait for it
            time.sleep(0.05)
        jobs.succeed(5)


def in_world(size: int, folder: Path, target: Callable[..., None], *arguments: Any) -> None:
    """Runs target(rank, *arguments) in a world, which must succeed."""
    with Jobs(folder) as jobs:
        jobs.world("rank", size, target, *arguments)
        jobs.succeed()
