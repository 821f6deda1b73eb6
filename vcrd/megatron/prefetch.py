"""Draws micro-batches ahead of the script, so that the teacher can be asked early; draws them again in a rerun."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.question import Question
from vcrd.megatron.packing import Doubts, edges_in, field, look_for_borders, packed
from vcrd.megatron.random_state import WhoDraws, changed, names_of, random_state, set_random_state
from vcrd.megatron.routing import teachers_of
from vcrd.megatron.teacher_context import context_of

TokensOf = str | Callable[[Any], Tensor]

_NOT_SAVED = object()
_RERUN = "megatron.core.rerun_state_machine"


class _Asked(NamedTuple):
    """A micro-batch that was drawn from the source and asked for."""

    number: int
    batch: Any
    moved: dict[str, tuple[Any, Any]]  # by generator: its state before the draw and after it
    loader_state: Any  # the source's `save_state()` before the draw, if it may be asked for


class Prefetcher:
    """An iterator over `source` that calls `ask(question)` for `ahead` micro-batches more than were drawn.

    number: what `ask` returned for the micro-batch that was drawn last; -1 before the first. batch: that micro-batch.
    drawn: how many were drawn. late: while true, it asks nothing and draws nothing ahead; its owner asks for `batch`.
    in_step: whether it draws ahead within the present step only, by `step_size`.
    tokens_of: the key of the tokens in a micro-batch, or a function that finds them; int [b, s]. Edges of packed
    sequences are taken from the micro-batch (`packing.packed`).
    who_draws: watches the generators and decides whether to draw ahead at all. Default: always.
    step_size: returns the number of micro-batches in the present step, 0 if it is not known.

    The random state is always the same as with `ahead` 0: after an early draw the generators that it moved are put
    back, and they are moved when the micro-batch is handed out. The same holds for `save_state()`, which exists if the
    source has it, for Megatron's --dataloader-save: it is the source's state before the first micro-batch that was not
    handed out. Megatron saves after a step, so the source's own is called and copied before each draw for a later step.

    next() raises ValueError if something else has moved a generator since an early draw read it. save_state() raises
    RuntimeError in the middle of a step, by `step_size`, if micro-batches are pending.
    """

    def __init__(
        self,
        source: Iterator[Any],
        ask: Callable[[Question], int],
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
        self.in_step = False
        self._ask = ask
        self._ahead = ahead
        self._tokens_of = tokens_of
        self._who_draws = who_draws
        self._step_size = step_size
        self._asked: deque[_Asked] = deque()
        self._exhausted = False
        self._left: dict[str, Any] | None = None  # the random state in which the last draw left the script
        self._step: list[dict[str, tuple[Any, Any]]] = []  # `moved` of each micro-batch of this step
        self._saves = hasattr(source, "save_state")
        if self._saves:
            self.save_state = self._save_state  # an attribute, because Megatron tests with hasattr

    @property
    def pending(self) -> int:
        """The number of micro-batches that were asked for and not yet drawn."""
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
            raise expected(
                "credits",
                "0 where something besides the data iterator now and then draws from its generators",
                (
                    f"{self._ahead}; a micro-batch was drawn early from {names_of(clash)}, which something else has "
                    "moved since, so that a run that resumes here would draw another one"
                ),
            )
        self._asked.popleft()
        self._move(asked.moved, now)
        self._step.append(asked.moved)
        self.number, self.batch = asked.number, asked.batch
        self.drawn += 1
        return self.batch

    def begin_step(self) -> None:
        """Micro-batches that are drawn from now on belong to a new step."""
        self._step.clear()

    def draw_again(self, position: int) -> None:
        """Moves the random state as the draw of the micro-batch at this position of the step did. Positions begin at 0.

        In a rerun Megatron restores the random state of the step's beginning and takes the micro-batches that it kept.
        """
        now = random_state()
        moved = self._step[position] if position < len(self._step) else {}
        elsewhere = changed({name: now.get(name) for name in moved}, _before(moved))
        self._move({name: states for name, states in moved.items() if name not in elsewhere}, now)

    def stop(self) -> None:
        """Asks for nothing more. Drawing goes on with what is pending, then from the source."""
        self._ask, self._ahead = lambda question: -1, 0

    def _move(self, moved: dict[str, tuple[Any, Any]], now: dict[str, Any]) -> None:
        after = {name: states[1] for name, states in moved.items()}
        set_random_state(after)
        self._left = {**now, **after}

    def _wanted(self) -> int:
        may = not self.late and (self._who_draws is None or self._who_draws.may_draw_ahead())
        ahead = self._ahead if may else 0
        if self.in_step:
            ahead = min(ahead, max(0, self._step_size() - len(self._step) - 1))
        return 1 + ahead

    def _fill(self, now: dict[str, Any]) -> None:
        """Draws and asks for the next micro-batch and those ahead. The random state stays `now`."""
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
                number = -1 if self.late else self._ask(question_of(batch, self._tokens_of))
                before, state = state, random_state()
                moved = {name: (before.get(name), after) for name, after in changed(before, state).items()}
                self._asked.append(_Asked(number, batch, moved, loader_state))
                if self._who_draws is not None:
                    self._who_draws.data(moved)
        finally:
            set_random_state(changed(random_state(), now))

    def _state_before_next(self) -> Any:
        """A copy of the source's own state, if the next draw is early and may be the first of a later step."""
        position = len(self._step) + len(self._asked)
        if not self._saves or not self._asked or position < self._step_size():
            return _NOT_SAVED
        return copy.deepcopy(self.source.save_state())

    def _save_state(self) -> Any:
        state = self._asked[0].loader_state if self._asked else self.source.save_state()
        if state is _NOT_SAVED:
            raise RuntimeError(
                f"save_state: expected a call at the end of a step of {self._step_size()} micro-batches (by "
                f"Megatron's calculator), got one after {len(self._step)} were drawn and {self.pending} drawn ahead "
                "(with credits 0 it is allowed at any time)"
            )
        return state


def _before(moved: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {name: states[0] for name, states in moved.items()}


def question_of(batch: Any, tokens_of: TokensOf, arguments: Any = None) -> Question:
    """What a teacher in another job is asked about a micro-batch.

    arguments: those of the model's forward, if they are known. If the micro-batch has no edges, edges and tokens are
    taken from them, because a script may pack in its forward step.
    ValueError if there are no tokens, if edges or the teacher's context are wrong, or if sequences have borders that
    no edge names.
    """
    if edges_in(batch) is None and arguments is not None and edges_in(arguments) is not None:
        tokens = field(arguments, "input_ids")
        if not isinstance(tokens, Tensor):
            tokens = tokens_in(batch, tokens_of)
        shape = tokens.shape
        tokens, edges = packed(batch, tokens, arguments)
        context = context_of(batch, tokens, edges, arguments)
        return Question(tokens, edges, context, teachers_of(batch, edges, shape, arguments))
    own = tokens_in(batch, tokens_of)
    tokens, edges = packed(batch, own)
    doubts = Doubts()
    look_for_borders(doubts, batch, edges, torch.arange(tokens.shape[1]), tokens.shape[0], (batch,))
    doubts.send()
    doubts.check()
    return Question(tokens, edges, context_of(batch, tokens, edges), teachers_of(batch, edges, own.shape))


def tokens_in(batch: Any, tokens_of: TokensOf) -> Tensor:
    """The tokens [b, s] of a micro-batch; ValueError if there are none."""
    if callable(tokens_of):
        tokens = tokens_of(batch)
    else:
        try:
            tokens = batch[tokens_of]
        except (KeyError, TypeError, IndexError):
            found = f"the keys {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
            raise expected("tokens", f"a micro-batch with {tokens_of!r}", found) from None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise expected("tokens", "a tensor [b, s] in the micro-batch", got)
    return tokens


def running_again() -> bool:
    """Whether Megatron's rerun state machine runs the present step again, from micro-batches that it kept.

    The same on every rank. False in a process that resumes from the checkpoint of a rejected step: it has drawn nothing
    yet, and Megatron gives it the step's samples as to any process that resumes.
    """
    # Not through Megatron's function, which would create a machine in a script that uses none.
    machine = getattr(sys.modules.get(_RERUN), "_GLOBAL_RERUN_STATE_MACHINE", None)
    return machine is not None and machine.state.name == "RERUNNING_IN_PLACE"


def keeps_micro_batches(data_iterator: Any) -> bool:
    """Whether this is Megatron's `RerunDataIterator`, which can rewind to the first micro-batch of a step."""
    kind = getattr(sys.modules.get(_RERUN), "RerunDataIterator", None)
    return kind is not None and isinstance(data_iterator, kind)


class ReplayIterator:
    """An iterator over a rewound `source` that calls `ask(question)` for each micro-batch when it is drawn.

    batch, late: as in `Prefetcher`. ahead: the prefetcher that drew them first; it moves the random state again.
    """

    def __init__(
        self, source: Any, ask: Callable[[Question], int], tokens_of: TokensOf, ahead: Prefetcher
    ) -> None:
        self.source = source
        self.drawn = 0
        self.batch: Any = None
        self.late = False
        self._ask = ask
        self._tokens_of = tokens_of
        self._ahead = ahead

    def __iter__(self) -> ReplayIterator:
        return self

    def __next__(self) -> Any:
        self.batch = next(self.source)
        self._ahead.draw_again(self.drawn)
        if not self.late:
            self._ask(question_of(self.batch, self._tokens_of))
        self.drawn += 1
        return self.batch
