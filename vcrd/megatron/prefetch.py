"""Looks at the micro-batches that a script draws, and a few ahead, so that the teacher can be asked early."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcrd.megatron.borders import Doubts, look_for_borders
from vcrd.megatron.packing import edges_in, field, packed
from vcrd.megatron.random_state import WhoDraws, changed, names_of, random_state, set_random_state

TokensOf = str | Callable[[Any], Tensor]

_NOT_SAVED = object()


class _Asked(NamedTuple):
    """A micro-batch that was drawn from the source."""

    number: int
    batch: Any
    moved: dict[str, tuple[Any, Any]]  # by generator, its state before the draw and after it
    loader_state: Any  # of the source before the draw, where it saves its own and may be asked for it


class Prefetcher:
    """An iterator over `source` that calls `ask(tokens, edges)` for `ahead` micro-batches more than were drawn.

    number: what `ask` returned for the micro-batch that was drawn last; -1 before the first. drawn: how many were.
    batch: that micro-batch. late: while true it asks nothing and draws no more than it is asked for; then its owner
    asks, of `batch`.
    tokens_of: the key of the tokens in a micro-batch, or a function that finds them; int [b, s]. Edges of sequences
    that are packed into a row are taken from the micro-batch (`packing.packed`).
    who_draws: watches the generators and says whether to look ahead at all. Default: always.
    step_size: the micro-batches of the step under way, 0 where it is not known.

    The random state is at any time what it is with `ahead` 0: what an early draw moved is put back, and is moved when
    the micro-batch is handed out. So is `save_state()`, which is here where the source has it, for Megatron's
    --dataloader-save: the state of the source before the first micro-batch that was not handed out. For that the
    source's own is called and copied before each draw for a later step, for Megatron saves after a step.

    next() raises ValueError where an early draw read a generator that something else has moved since. save_state()
    raises RuntimeError in the middle of a step, as `step_size` says, where something is pending.
    """

    def __init__(
        self,
        source: Iterator[Any],
        ask: Callable[[Tensor, Tensor], int],
        ahead: int,
        tokens_of: TokensOf,
        who_draws: WhoDraws | None = None,
        step_size: Callable[[], int] = lambda: 0,
    ) -> None:
        self.source = source
        self.number = -1
        self.drawn = 0
        self.batch: Any = None
        self.late = False
        self._ask = ask
        self._ahead = ahead
        self._tokens_of = tokens_of
        self._who_draws = who_draws
        self._step_size = step_size
        self._asked: deque[_Asked] = deque()
        self._exhausted = False
        self._left: dict[str, Any] | None = None  # the random state in which the last draw left the script
        self._step: list[dict[str, tuple[Any, Any]]] = []  # `moved` of what was handed out in this step
        self._saves = hasattr(source, "save_state")
        if self._saves:
            self.save_state = self._save_state  # Megatron asks with hasattr

    @property
    def pending(self) -> int:
        """Micro-batches that were asked for and not yet drawn."""
        return len(self._asked)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        now = random_state()
        if self._who_draws is not None and self._left is not None:
            self._who_draws.others(changed(self._left, now))
        self._fill(now)
        if not self._asked:
            raise StopIteration
        asked = self._asked[0]
        clash = sorted(changed({name: now.get(name) for name in asked.moved}, _before(asked.moved)))
        if clash:
            raise ValueError(
                "credits: expected 0 where something besides the data iterator now and then draws from its generators, "
                f"got {self._ahead}; a micro-batch was drawn early from {names_of(clash)}, moved by something else "
                "since, and a run that resumes here would draw another one"
            )
        self._asked.popleft()
        self._move(asked.moved, now)
        self._step.append(asked.moved)
        self.number, self.batch = asked.number, asked.batch
        self.drawn += 1
        return self.batch

    def begin_step(self) -> None:
        """What is drawn from here on belongs to a new step."""
        self._step.clear()

    def draw_again(self, position: int) -> None:
        """Moves the random state as drawing the micro-batch at this position of the step did, from 0.

        Megatron puts it back to the step's beginning, and takes the micro-batches from what it kept.
        """
        now = random_state()
        moved = self._step[position] if position < len(self._step) else {}
        elsewhere = changed({name: now.get(name) for name in moved}, _before(moved))
        self._move({name: states for name, states in moved.items() if name not in elsewhere}, now)

    def stop(self) -> None:
        """Asks no more: what is pending is drawn first, then the source."""
        self._ask, self._ahead = lambda tokens, edges: -1, 0

    def _move(self, moved: dict[str, tuple[Any, Any]], now: dict[str, Any]) -> None:
        after = {name: states[1] for name, states in moved.items()}
        set_random_state(after)
        self._left = {**now, **after}

    def _wanted(self) -> int:
        may = not self.late and (self._who_draws is None or self._who_draws.may_draw_ahead())
        return 1 + self._ahead if may else 1

    def _fill(self, now: dict[str, Any]) -> None:
        """Draws and asks for the next micro-batch and those ahead; the random state stays `now`."""
        if self._exhausted or len(self._asked) >= self._wanted():
            return
        state = dict(now)
        for asked in self._asked:
            state.update((name, states[1]) for name, states in asked.moved.items())
        set_random_state(changed(now, state))
        try:
            while len(self._asked) < self._wanted():
                loader_state = self._state_before_next()
                try:
                    batch = next(self.source)
                except StopIteration:
                    self._exhausted = True
                    break
                number = -1 if self.late else self._ask(*question(batch, self._tokens_of))
                before, state = state, random_state()
                moved = {name: (before.get(name), after) for name, after in changed(before, state).items()}
                self._asked.append(_Asked(number, batch, moved, loader_state))
                if self._who_draws is not None:
                    self._who_draws.data(moved)
        finally:
            set_random_state(changed(random_state(), now))

    def _state_before_next(self) -> Any:
        """A copy of the source's own state, where the next draw is early and may be the first of a later step."""
        position = len(self._step) + len(self._asked)
        if not self._saves or not self._asked or position < self._step_size():
            return _NOT_SAVED
        return copy.deepcopy(self.source.save_state())

    def _save_state(self) -> Any:
        state = self._asked[0].loader_state if self._asked else self.source.save_state()
        if state is _NOT_SAVED:
            raise RuntimeError(
                f"save_state: expected to be called at the end of a step of {self._step_size()} micro-batches, as "
                f"Megatron's calculator says, got {len(self._step)} of them drawn and {self.pending} drawn ahead "
                "(with credits 0 it is allowed at any time)"
            )
        return state


def _before(moved: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {name: states[0] for name, states in moved.items()}


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
