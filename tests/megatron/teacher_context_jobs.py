"""What processes do in the tests of a teacher's context, and a run of the teacher on each concatenation by itself."""

from __future__ import annotations

from typing import NamedTuple

import jobs
import torch
from torch import Tensor

from examples.demo.convert import load
from examples.demo.model import Shape, build, configure
from vcrd.link import host_rendezvous
from vcrd.link.plan import context_rows
from vcrd.link.question import Context
from vcrd.link.student import StudentLink
from vcrd.teacher_logits import HiddenStates, TopKLogits

LONGEST = 9  # tokens of context that a sequence may have


class Case(NamedTuple):
    """A micro-batch: tokens [b, s], the edges of packed sequences, and the context of each row or sequence."""

    tokens: Tensor
    edges: list[int]
    contexts: list[tuple[list[int], list[int]]]  # of each: tokens, and the positions before which they are seen

    @property
    def cuts(self) -> list[tuple[int, int]]:
        batch, width = self.tokens.shape
        edges = self.edges or list(range(0, batch * width + 1, width))
        return list(zip(edges, edges[1:], strict=False))

    @property
    def flat(self) -> Context:
        """As a question holds it."""
        tokens = [token for found, _ in self.contexts for token in found]
        cuts = zip(self.contexts, self.cuts, strict=True)
        places = [start + position for (_, positions), (start, _) in cuts for position in positions]
        return Context(torch.tensor(tokens, dtype=torch.int64), torch.tensor(places, dtype=torch.int64))


def cases(seed: int, packed: bool, step: int = 1, count: int = 4) -> list[Case]:
    """Micro-batches of random tokens, some sequences of which have a random context. step: of all lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    found = []
    for number in range(count):
        edges: list[int] = []
        if packed:
            inner = draw(1, jobs.SEQUENCE // step, 2)
            edges = sorted({0, *(step * edge for edge in inner), jobs.SEQUENCE})
        batch = 1 if packed else 2
        lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)] or [jobs.SEQUENCE] * batch
        contexts: list[tuple[list[int], list[int]]] = []
        for length in lengths:
            # The first micro-batch has none, and others have it in some rows only.
            (size,) = draw(0, LONGEST + 1, 1) if number and draw(0, 3, 1) != [0] else (0,)
            contexts.append((draw(0, jobs.TRUE_VOCAB, size), sorted(draw(0, length, size))))
        tokens = torch.randint(jobs.TRUE_VOCAB, (batch, jobs.SEQUENCE), generator=generator)
        found.append(Case(tokens, edges, contexts))
    return found


def model(shape: Shape = jobs.TEACHER, seed: int = 2, longest: int = jobs.SEQUENCE + LONGEST) -> torch.nn.Module:
    """This rank's part of a model that takes longer sequences than the student's."""
    part = build(shape, configure(shape, shape.layers), longest)
    load(part, jobs.weights(shape, seed).__getitem__, shape, range(shape.layers))
    return part


def serve(settings, microbatches: int | None = None) -> int:
    from vcrd.megatron import serve

    return serve(model(), settings, microbatches=microbatches)


@torch.no_grad()
def alone(teacher: torch.nn.Module, case: Case) -> Tensor:
    """Logits [s, b, v] for the student's positions, from one run of the teacher for each sequence with its context."""
    batch, width = case.tokens.shape
    flat, rows = case.tokens.flatten().tolist(), []
    for (start, stop), (context, positions) in zip(case.cuts, case.contexts, strict=True):
        seen, own, rest = [], [], list(zip(positions, context, strict=True))
        for position in range(stop - start):
            while rest and rest[0][0] <= position:
                seen.append(rest.pop(0)[1])
            own.append(len(seen))
            seen.append(flat[start + position])
        logits = teacher(torch.tensor([seen]), torch.arange(len(seen))[None], None)
        rows.append(logits[0, own])
    return torch.cat(rows).view(batch, width, -1).transpose(0, 1)


def truths(groups: list[list[Case]]) -> list[list[Tensor]]:
    teacher = model().eval()
    return [[alone(teacher, case)[..., : jobs.TRUE_VOCAB] for case in group] for group in groups]


def ask(settings, asked: list[Case], context_size: int = 1) -> list[Tensor]:
    """Log-probabilities [s / context_size, b, v] that this rank receives from the teacher."""
    import torch.distributed as dist

    rank = dist.get_rank()
    rendezvous = host_rendezvous(settings.link) if rank == 0 else None
    link = StudentLink.connect(
        settings.link,
        vocab_size=jobs.TRUE_VOCAB,
        padded_vocab_size=jobs.STUDENT.vocab_size,
        sequence_length=jobs.SEQUENCE,
        tensor_rank=0,
        tensor_size=1,
        data_rank=0,
        data_size=1,
        context_rank=rank,
        context_size=context_size,
    )
    if rank == 0:
        for case in asked:
            link.request(case.tokens, case.edges, case.flat)
    answers = [_log_probabilities(link.receive(number)) for number in range(len(asked))]
    link.close()
    if rendezvous is not None:
        rendezvous.close()
    return answers


def _log_probabilities(answer) -> Tensor:
    if isinstance(answer, TopKLogits):  # of all tokens
        order = answer.ids.long().argsort(-1)
        return answer.logprobs.gather(-1, order)
    if isinstance(answer, HiddenStates):
        return (answer.scale * answer.states @ answer.weight.T).log_softmax(-1)
    logits = answer.logits
    if logits.dtype == torch.uint8:
        logits = -24 * (logits.float() / 255) ** 2
    return logits.float().log_softmax(-1)


def part_of(truth: Tensor, case: Case, rank: int, size: int) -> Tensor:
    """The positions that a context-parallel rank holds."""
    spans = context_rows(jobs.SEQUENCE, rank, size, case.edges)
    return torch.cat([truth[span.start : span.stop] for span in spans])
