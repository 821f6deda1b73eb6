"""Megatron's rerun state machine runs a step again with the same micro-batches: they are asked for again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vcrd.megatron.prefetch import Prefetcher, TokensOf, question

_MODULE = "megatron.core.rerun_state_machine"


def running_again() -> bool:
    """Whether the step under way is run again, from micro-batches that Megatron kept; alike on every rank.

    Not in a process that resumes from the checkpoint of a rejected step: it has drawn nothing yet, and Megatron gives
    it the step's samples as to any other that resumes.
    """
    # Not by Megatron's function, which would set up a machine where a script uses none.
    machine = getattr(sys.modules.get(_MODULE), "_GLOBAL_RERUN_STATE_MACHINE", None)
    return machine is not None and machine.state.name == "RERUNNING_IN_PLACE"


def keeps_micro_batches(data_iterator: Any) -> bool:
    """Whether this is Megatron's `RerunDataIterator`, which can rewind to the first micro-batch of a step."""
    kind = getattr(sys.modules.get(_MODULE), "RerunDataIterator", None)
    return kind is not None and isinstance(data_iterator, kind)


class ReplayIterator:
    """An iterator over `source`, rewound, that calls `ask(tokens, edges)` for each micro-batch when it is drawn.

    batch, late: as of `Prefetcher`. ahead: what drew them first; it moves the random state as it did then.
    """

    def __init__(
        self, source: Any, ask: Callable[[Tensor, Tensor], int], tokens_of: TokensOf, ahead: Prefetcher
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
            self._ask(*question(self.batch, self._tokens_of))
        self.drawn += 1
        return self.batch
