"""Looks at the micro-batches that a script draws, and a few ahead, so that the teacher can be asked early."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vcrd.megatron.borders import Doubts, look_for_borders
from vcrd.megatron.packing import edges_in, field, packed

TokensOf = str | Callable[[Any], Tensor]


class AskAhead:
    """An iterator over `source` that calls `ask(tokens, edges)` for `ahead` micro-batches more than were drawn.

    number: what `ask` returned for the micro-batch that was drawn last; -1 before the first. drawn: how many were.
    batch: that micro-batch. late: while true it asks nothing and draws no more than it is asked for; then its owner
    asks, of `batch`.
    tokens_of: the key of the tokens in a micro-batch, or a function that finds them; int [b, s]. Edges of sequences
    that are packed into a row are taken from the micro-batch (`packing.packed`).
    """

    def __init__(
        self, source: Iterator[Any], ask: Callable[[Tensor, Tensor], int], ahead: int, tokens_of: TokensOf
    ) -> None:
        self.source = source
        self.number = -1
        self.drawn = 0
        self.batch: Any = None
        self.late = False
        self._ask = ask
        self._ahead = ahead
        self._tokens_of = tokens_of
        self._asked: deque[tuple[int, Any]] = deque()
        self._exhausted = False

    @property
    def pending(self) -> int:
        """Micro-batches that were asked for and not yet drawn."""
        return len(self._asked)

    def __iter__(self) -> AskAhead:
        return self

    def __next__(self) -> Any:
        self._fill(1 if self.late else self._ahead + 1)
        if not self._asked:
            raise StopIteration
        self.number, self.batch = self._asked.popleft()
        self.drawn += 1
        return self.batch

    def fill(self) -> None:
        """Asks until `ahead` micro-batches are pending, or the source has no more."""
        self._fill(0 if self.late else self._ahead)

    def stop(self) -> None:
        """Asks no more: what is pending is drawn first, then the source."""
        self._ask, self._ahead = lambda tokens, edges: -1, 0

    def _fill(self, count: int) -> None:
        while not self._exhausted and len(self._asked) < count:
            try:
                batch = next(self.source)
            except StopIteration:
                self._exhausted = True
                break
            number = -1 if self.late else self._ask(*question(batch, self._tokens_of))
            self._asked.append((number, batch))


def question(batch: Any, tokens_of: TokensOf, arguments: Any = None) -> tuple[Tensor, Tensor]:
    """What a teacher elsewhere is asked about a micro-batch: tokens [b, s], and the edges of packed sequences.

    arguments: those of the model's forward, where they are known. Edges are taken from them where the micro-batch has
    none, and then the tokens too, for a script may pack in its step.
    ValueError where there are no tokens, or edges that are none, or borders of sequences that no edge names.
    """
    if edges_in(batch) is None and arguments is not None and edges_in(arguments) is not None:
        tokens = field(arguments, "input_ids")
        if not isinstance(tokens, Tensor):
            tokens = tokens_in(batch, tokens_of)
        return packed(batch, tokens, arguments)
    tokens, edges = packed(batch, tokens_in(batch, tokens_of))
    doubts = Doubts()
    look_for_borders(doubts, batch, edges, torch.arange(tokens.shape[1]), tokens.shape[0], (batch,))
    doubts.send()
    doubts.check()
    return tokens, edges


def tokens_in(batch: Any, tokens_of: TokensOf) -> Tensor:
    """The tokens [b, s] of a micro-batch; ValueError where there are none."""
    if callable(tokens_of):
        tokens = tokens_of(batch)
    else:
        try:
            tokens = batch[tokens_of]
        except (KeyError, TypeError, IndexError):
            found = f"the keys {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
            raise ValueError(f"tokens: expected a micro-batch with {tokens_of!r}, got {found}") from None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens: expected a tensor [b, s] in the micro-batch, got {got}")
    return tokens
