"""Teachers without a job: their logits are a function of a token, its position and the context before it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from vcrd.link.payload import encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard, context_rows, vocab_shards
from vcrd.link.question import Question
from vcrd.link.student import Waits
from vcrd.megatron.teachers import Teachers
from vcrd.settings import LinkSettings
from vcrd.teacher_logits import DenseLogits, HiddenStates, TeacherLogits, TopKLogits

VOCAB, PADDED, SIZE = 45, 48, 8


def layout(tensor_rank=0, tensor_size=1, context_rank=0, context_size=1, groups=None) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        context_rank=context_rank,
        context_size=context_size,
        data_rank=0,
        asks=tensor_rank == context_rank == 0,
        device=torch.device("cpu"),
        groups=groups,
    )


class Made:
    """One teacher, for one student rank. asked: the questions in their order."""

    def __init__(self, seed: int, payload: str, place: SimpleNamespace, top_k: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Sums of table entries, because the bits of a product may depend on its shape.
        size = SIZE if payload == "hidden" else VOCAB
        self._tokens = torch.randn(VOCAB, size, generator=generator)
        self._positions = torch.randn(64, size, generator=generator)
        self._layer = torch.randn(VOCAB, SIZE, generator=generator)
        self._payload, self._top_k, self._place = payload, top_k, place
        self._shard = vocab_shards(VOCAB, PADDED, place.tensor_size)[place.tensor_rank]
        self.asked: list[Question] = []
        self.waits, self.served_by, self.bytes_received, self.tokenizer = Waits(), (0, 1), 0, None

    def request(self, tokens: Tensor, edges: Tensor, context) -> int:
        self.asked.append(Question(tokens, edges, context))
        return len(self.asked) - 1

    def receive(self, number: int) -> TeacherLogits:
        return self.answer(self.asked[number])

    def close(self) -> None:
        pass

    def states(self, question: Question) -> Tensor:
        """Hidden states, or logits, of all positions [s, b, ..]."""
        tokens, edges, context, _ = question
        rows, width = tokens.shape
        starts = edges if len(edges) else torch.tensor([0])
        positions = torch.arange(width)
        own = positions - starts[torch.bucketize(positions, starts[1:], right=True)]
        states = self._tokens[tokens] + self._positions[own]
        first = (
            torch.arange(rows)[:, None] * width + starts[torch.bucketize(positions, starts[1:], right=True)]
        )
        flat = torch.arange(rows * width).view(rows, width)
        for token, place in zip(context.tokens.tolist(), context.places.tolist(), strict=True):
            # Seen by the tokens of the same row or sequence from there on.
            sees = (flat >= place) & (first <= place) & (place // width == torch.arange(rows)[:, None])
            states = states + sees[..., None] * self._tokens[token]
        return states.transpose(0, 1)

    def logits(self, question: Question) -> Tensor:
        """[s, b, vocabulary] of all positions."""
        states = self.states(question)
        return states @ self._layer.T if self._payload == "hidden" else states

    def answer(self, question: Question) -> TeacherLogits:
        """In the form of the payload, for the positions and columns of this rank."""
        place, width = self._place, question.tokens.shape[1]
        spans = context_rows(width, place.context_rank, place.context_size, question.edges.tolist())
        here = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        columns = slice(self._shard.start, self._shard.stop)
        if self._payload == "hidden":
            return HiddenStates(self.states(question)[here], self._layer[columns])
        logits = self.logits(question)[here]
        if self._payload == "topk":
            return TopKLogits(*top_k_of(logits, self._top_k, Shard(0, VOCAB), None))
        return DenseLogits(encode(payload_named(self._payload), logits[..., columns], row_max(logits)))


class Alone(Teachers):
    """As on a rank that shares its micro-batches with no other."""

    def _opened(self):
        return None


def settings(names: tuple[str, ...]) -> LinkSettings:
    return LinkSettings(address=",".join(f"{name}=h:{n}" for n, name in enumerate(names, 1)), timeout=30)


def made(payloads: dict[str, str], place: SimpleNamespace) -> dict[str, Made]:
    return {name: Made(seed, payload, place) for seed, (name, payload) in enumerate(payloads.items())}
