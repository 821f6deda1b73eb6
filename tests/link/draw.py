"""Layouts of both jobs drawn at random, run with real processes: each student rank receives its part of the truth.

    python tests/link/draw.py --count 40 --seed 7

prints a line per layout, and the output of processes that failed; exit status 1 if any did. Needs the repository on
PYTHONPATH. Several layouts run one after another in one pair of worlds, each a run of its own name on the ranks that
it needs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from link_jobs import Jobs, Layout, device
from ports import free_port
from torch import Tensor

from vcrd.link import Head, LinkSettings, StudentLink, TeacherLink, host_rendezvous
from vcrd.link.connection import HEADER_BYTES
from vcrd.link.payload import PAYLOADS, STATE_DTYPES
from vcrd.link.plan import overlaps, pieces_of
from vcrd.teacher_logits import HiddenStates, TeacherLogits, TopKLogits, factor_of

MOST_RANKS = 8  # of either side
PATIENCE = timedelta(minutes=30)  # of ranks that have nothing to do in a layout
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Batch:
    """The shape of a micro-batch, and the edges of what is packed into it."""

    rows: int
    sequence: int
    edges: tuple[int, ...] = ()


@dataclass
class Drawn:
    """A layout, what travels over it, and the micro-batches that each data rank asks for."""

    layout: Layout
    payload: str
    top_k: int
    credits: int
    limit: int  # requests that the teacher takes at once
    dtype: str  # of the teacher's logits or states
    head: Head | None
    batches: list[Batch] = field(default_factory=list)
    transport: str = field(default_factory=lambda: LinkSettings().transport)

    def __str__(self) -> str:
        layout, what = self.layout, self.payload
        if self.payload == "topk":
            what += f" {self.top_k}"
        if self.head:
            what += f" {self.head.size} x {self.head.dtype}"
        packed = sum(bool(batch.edges) for batch in self.batches)
        return (
            f"student tp {layout.student_tensor} cp {layout.student_context} dp {layout.student_data}, "
            f"teacher tp {layout.teacher_tensor} pp {1 + layout.pipeline} x {layout.replicas}, "
            f"vocab {layout.vocab} in {layout.student_padded} and {layout.teacher_padded}, {what}, from {self.dtype}, "
            f"credits {self.credits}, batches {len(self.batches)}, packed {packed}"
        )

    def settings(self, port: int, name: str) -> LinkSettings:
        return LinkSettings(
            address=f"127.0.0.1:{port}",
            name=name,
            payload=self.payload,
            top_k=self.top_k,
            credits=self.credits,
            transport=self.transport,
            **dict.fromkeys(("timeout", "connect_timeout"), 120),
        )


def draw(dice: random.Random, payload: str | None = None) -> Drawn:
    """Any layout that the two grids allow, small; of a given payload, or of any."""
    while True:
        layout = Layout(
            student_tensor=dice.randint(1, 4),
            student_context=dice.randint(1, 3),
            student_data=dice.randint(1, 4),
            teacher_tensor=dice.randint(1, 4),
            pipeline=dice.randint(0, 2),
            replicas=dice.randint(1, 3),
            vocab=dice.choice([dice.randint(1, 12), dice.randint(13, 200)]),
        )
        fits = layout.replicas <= layout.student_data
        if fits and max(layout.students, layout.teachers * layout.replicas) <= MOST_RANKS:
            break
    layout.student_padded += layout.student_tensor * dice.choice([0, 0, dice.randint(0, 20)])
    layout.teacher_padded += layout.teacher_tensor * dice.choice([0, 0, dice.randint(0, 20)])
    payload = payload or dice.choice([each.name for each in PAYLOADS])
    dtype = dice.choice(list(DTYPES))
    head = None
    if payload == "hidden":
        scale, softcap = dice.choice([(1.0, None), (0.25, None), (1.0, 30.0)])
        head = Head(dice.randint(1, 33), dice.choice(list(STATE_DTYPES)), scale, softcap)
        dtype = head.dtype
    unit = 2 * layout.student_context if layout.student_context > 1 else 1
    batches = [_batch(dice, unit) for _ in range(dice.randint(4, 7))]
    layout.sequence = max(batch.sequence for batch in batches)
    return Drawn(
        layout,
        payload,
        dice.randint(1, layout.vocab),
        dice.randint(1, 3),
        dice.randint(1, 4),
        dtype,
        head,
        batches,
    )


def _batch(dice: random.Random, unit: int) -> Batch:
    if dice.random() < 0.5:
        return Batch(dice.randint(1, 3), unit * dice.randint(1, 4))
    edges = [0]
    for _ in range(dice.randint(1, 4)):
        edges.append(edges[-1] + unit * dice.choice([0, 1, 2, 3]))
    if edges[-1] + 1 < len(edges):  # as many sequences as tokens is the most
        edges = [0, unit]
    return Batch(1, edges[-1], tuple(edges))


# The truth, the same in every process: what the teacher computes for a micro-batch, and what a rank holds of it.


def tokens_of(drawn: Drawn, data_rank: int, number: int) -> Tensor:
    batch = drawn.batches[number]
    generator = torch.Generator().manual_seed(1000 * data_rank + number)
    return torch.randint(drawn.layout.vocab, (batch.rows, batch.sequence), generator=generator)


def states_of(drawn: Drawn, data_rank: int, number: int) -> Tensor:
    """The teacher's last hidden states, [s, b, size]."""
    batch = drawn.batches[number]
    generator = torch.Generator().manual_seed(2000 + 1000 * data_rank + number)
    shape = (batch.sequence, batch.rows, drawn.head.size)
    return torch.randn(*shape, generator=generator).to(STATE_DTYPES[drawn.head.dtype])


def weight_of(drawn: Drawn) -> Tensor:
    """The teacher's output layer, [vocab, size]."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(drawn.layout.vocab, drawn.head.size, generator=generator)
    return weight.to(STATE_DTYPES[drawn.head.dtype])


def logits_of(drawn: Drawn, data_rank: int, number: int) -> Tensor:
    """The teacher's logits [s, b, vocab] in its dtype: others at every position, some of the coarse ones equal."""
    batch = drawn.batches[number]
    generator = torch.Generator().manual_seed(4000 + 1000 * data_rank + number)
    shape = (batch.sequence, batch.rows, drawn.layout.vocab)
    return (5 * torch.randn(*shape, generator=generator)).to(DTYPES[drawn.dtype])


def held(batch: Batch, rank: int, size: int) -> list[int]:
    """The positions of a context-parallel rank: of the 2 size chunks of each sequence, one from either end."""
    if size == 1:
        return list(range(batch.sequence))
    found: list[int] = []
    edges = batch.edges or (0, batch.sequence)
    for start, stop in zip(edges, edges[1:], strict=False):
        chunks = torch.arange(start, stop).view(2 * size, (stop - start) // (2 * size))
        found += chunks.index_select(0, torch.tensor([rank, 2 * size - rank - 1])).flatten().tolist()
    return found


def check(drawn: Drawn, place: dict, number: int, got: TeacherLogits) -> None:
    """AssertionError unless a rank got its positions and columns, within the error of the payload."""
    rows = held(drawn.batches[number], place["context_rank"], place["context_size"])
    width = place["padded_vocab_size"] // place["tensor_size"]
    columns = slice(place["tensor_rank"] * width, (place["tensor_rank"] + 1) * width)
    if isinstance(got, HiddenStates):
        _check_hidden(
            drawn, states_of(drawn, place["data_rank"], number)[rows], weight_of(drawn), columns, got
        )
        return
    truth = logits_of(drawn, place["data_rank"], number)[rows]
    if isinstance(got, TopKLogits):
        _check_top_k(truth.double(), drawn.top_k, got)
        return
    got, mine = got.logits, truth.double()[..., columns]
    distance = truth.double().amax(-1, keepdim=True) - mine
    assert got.shape == mine.shape
    if drawn.payload == "float32":
        assert torch.equal(got, truth[..., columns].float())
    elif drawn.payload == "float16":
        assert got.dtype == torch.float16
        assert ((got.double() + distance).abs() <= distance * (2**-11 + 2**-23) + 2**-25).all()
    else:
        assert got.dtype == torch.uint8
        error = (24 * (got.double() / 255) ** 2 - distance.clamp(max=24)).abs()
        assert (error <= 0.0193 * distance.sqrt() + 1e-4).all()


def on_cpu(answer: TeacherLogits) -> TeacherLogits:
    parts = (getattr(answer, field.name) for field in fields(answer))
    return type(answer)(*(part.cpu() if isinstance(part, Tensor) else part for part in parts))


def _check_top_k(truth: Tensor, k: int, got: TopKLogits) -> None:
    logprobs = truth.log_softmax(-1)
    order = truth.sort(dim=-1, descending=True, stable=True).indices  # equal ones by token
    assert torch.equal(got.ids.long(), order[..., :k]) and got.ids.dtype == torch.int32
    wanted = logprobs.gather(-1, order[..., :k])
    tail = logprobs.gather(-1, order[..., k:]).logsumexp(-1) if k < truth.shape[-1] else -torch.inf
    assert got.logprobs.shape == wanted.shape and got.log_tail.shape == truth.shape[:-1]
    torch.testing.assert_close(got.logprobs.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        got.log_tail.double(), torch.zeros_like(wanted[..., 0]) + tail, atol=1e-6, rtol=1e-6
    )


def _check_hidden(drawn: Drawn, states: Tensor, weight: Tensor, columns: slice, got: HiddenStates) -> None:
    assert torch.equal(got.states, states) and got.states.dtype == states.dtype
    assert torch.equal(got.weight, factor_of(weight[columns].to(device()), states.dtype).cpu())
    head = drawn.head
    assert (got.scale, got.softcap) == (head.scale, head.softcap)

    def logits(states: Tensor, weight: Tensor, scale: float, softcap: float | None) -> Tensor:
        made = scale * (states.double() @ weight.double().T)
        return softcap * torch.tanh(made / softcap) if softcap else made

    truth = logits(states, weight, head.scale, head.softcap)[..., columns]
    torch.testing.assert_close(logits(got.states, got.weight, got.scale, got.softcap), truth)


# The two jobs.


def bytes_wanted(link: StudentLink, drawn: Drawn, place: dict, layer: bool = True) -> int:
    """What the plan says that a rank receives: the pieces of every response, its rows of the output layer, and headers.

    layer: whether the output layer travels.
    """
    session = link._connections.session
    shards = session.teacher.shards(), link._handshake.shards()
    whole = session.payload.whole
    total = HEADER_BYTES * link._place.is_request_leader  # READY
    for batch in drawn.batches:
        tokens = batch.rows * batch.sequence // place["context_size"]
        for piece in pieces_of(link._place, *shards, whole):
            total += HEADER_BYTES + session.payload.bytes(tokens, piece.width)
    if drawn.head and layer:
        for piece in overlaps(*shards):
            if piece.receiver == link._place.tensor:
                total += (
                    HEADER_BYTES + piece.width * drawn.head.size * STATE_DTYPES[drawn.head.dtype].itemsize
                )
    return total


def run_student(rank: int, port: int, cases: Sequence[Drawn]) -> None:
    everyone = dist.new_group(timeout=PATIENCE)
    rendezvous = host_rendezvous(cases[0].settings(port, "x")) if rank == 0 else None
    for index, drawn in enumerate(cases):
        if rank < drawn.layout.students:
            print(f"run {index}: {drawn}", flush=True)
            study(drawn, drawn.layout.student(rank), drawn.settings(port, f"run{index}"))
    dist.barrier(everyone)
    if rendezvous:
        rendezvous.close()


def study(drawn: Drawn, place: dict, settings: LinkSettings) -> None:
    link, asked = StudentLink.connect(settings, **place, device=device()), 0
    for number, _ in enumerate(drawn.batches):
        while link._place.is_request_leader and asked < min(
            len(drawn.batches), number + settings.credits + 1
        ):
            edges = drawn.batches[asked].edges
            assert link.request(tokens_of(drawn, place["data_rank"], asked), edges) == asked
            asked += 1
        check(drawn, place, number, on_cpu(link.receive(number)))
    wanted = bytes_wanted(link, drawn, place)
    assert link.bytes_received == wanted, (link.bytes_received, wanted)
    link.close()


def run_teachers(rank: int, port: int, cases: Sequence[Drawn]) -> None:
    """The ranks of all replicas of each layout in turn, in one world; all ranks make all groups, in the same order."""
    everyone = dist.new_group(timeout=PATIENCE)
    for index, drawn in enumerate(cases):
        layout, mine = drawn.layout, None
        for replica in range(layout.replicas):
            ranks = [replica * layout.teachers + each for each in range(layout.teachers)]
            groups = dist.new_group(ranks), dist.new_group(ranks[layout.pipeline :])
            if rank in ranks:
                mine = (replica, rank - ranks[0], *groups)
        if mine:
            print(f"run {index}: {drawn}", flush=True)
            serve(drawn, drawn.settings(port, f"run{index}"), *mine)
    dist.barrier(everyone)  # rank 0 hosts the store of the groups


def serve(
    drawn: Drawn, settings: LinkSettings, replica: int, rank: int, group: dist.ProcessGroup, tensor_group
) -> None:
    layout = drawn.layout
    given = layout.teacher(replica, rank)
    place = given["place"]
    link = TeacherLink.connect(
        settings,
        **given,
        group=group,
        tensor_group=tensor_group if place.is_last_stage and place.tensor_size > 1 else None,
        **(dict(head=drawn.head, head_weight=head_rows(drawn, given)) if place.is_last_stage else {}),
        device=device(),
    )
    while (batch := link.next_batch(drawn.limit)) is not None:
        for request in batch:
            number, data_rank = request.number, request.data_rank
            assert torch.equal(request.tokens, tokens_of(drawn, data_rank, number))
            assert tuple(request.boundaries.tolist()) == drawn.batches[number].edges
            if place.is_last_stage:
                output = output_of(drawn, given, data_rank, number).to(device())
                link.respond(request, output)
                output.fill_(torch.nan)  # a teacher may reuse its buffers
    link.close()


def output_of(drawn: Drawn, given: dict, data_rank: int, number: int) -> Tensor:
    """What a rank of the last stage gives to the link: states, or its padded columns of the logits."""
    if drawn.head:
        return states_of(drawn, data_rank, number)
    logits = logits_of(drawn, data_rank, number)
    full = logits.new_full(
        (*logits.shape[:-1], given["padded_vocab_size"]), 1e4
    )  # the largest if padding counted
    full[..., : drawn.layout.vocab] = logits
    return full.chunk(given["place"].tensor_size, -1)[given["place"].tensor_rank].clone()


def head_rows(drawn: Drawn, given: dict) -> Tensor | None:
    """A teacher rank's padded rows of the output layer."""
    if drawn.head is None:
        return None
    weight = weight_of(drawn)
    full = weight.new_full((given["padded_vocab_size"], drawn.head.size), torch.nan)
    full[: drawn.layout.vocab] = weight
    return full.chunk(given["place"].tensor_size)[given["place"].tensor_rank]


def run(cases: Sequence[Drawn], folder: Path, seconds: float = 300) -> dict[str, str]:
    """Runs the layouts one after another in one pair of worlds; the output of every process that failed, by name."""
    port = free_port()
    with Jobs(folder) as jobs:
        jobs.world("student", max(drawn.layout.students for drawn in cases), run_student, port, cases)
        most = max(drawn.layout.teachers * drawn.layout.replicas for drawn in cases)
        jobs.world("teacher", most, run_teachers, port, cases)
        deadline = time.monotonic() + seconds
        while True:
            codes = [process.exitcode for process in jobs.processes.values()]
            if None not in codes or time.monotonic() > deadline:
                break
            if any(codes):  # the others need not wait for it until their time is over
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.1)
        failed = [name for name, process in jobs.processes.items() if process.exitcode != 0]
        return {name: shortened(jobs.output(name)) for name in failed}


def shortened(output: str) -> str:
    """Without the native frames that torch adds."""
    return "\n".join(line for line in output.splitlines() if not line.startswith("frame #"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="layouts to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=5, help="layouts that share a pair of worlds")
    parser.add_argument("--transport", default="auto", choices=["auto", "tcp", "fake"])
    arguments = parser.parse_args()
    dice, failed = random.Random(arguments.seed), 0
    for first in range(0, arguments.count, arguments.at_once):
        cases = [
            replace(draw(dice), transport=arguments.transport)
            for _ in range(min(arguments.at_once, arguments.count - first))
        ]
        with tempfile.TemporaryDirectory() as folder:
            outputs = run(cases, Path(folder))
        for index, drawn in enumerate(cases):
            print(f"{first + index:4d}  {drawn}", flush=True)
        for name, output in outputs.items():
            failed += 1
            print(f"--- {name}\n{output}", flush=True)
    print(f"{arguments.count} layouts, {failed} processes failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
