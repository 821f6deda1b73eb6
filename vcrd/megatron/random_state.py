"""The random state that Megatron saves in its checkpoints, and who moves it: the data or something else."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch

State = Mapping[str, Any]  # by generator

_log = logging.getLogger("vcrd")


def random_state() -> dict[str, Any]:
    """The states of the generators that `megatron.training` saves, by name; a snapshot that later draws leave alone.

    "random", "numpy" and "torch" are those of the process; "cuda" is the current device's, once CUDA is in use;
    "tracker NAME" is one of Megatron's CudaRNGStatesTracker. No collective, no wait for the device.
    """
    found = {"random": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    device = _device_generator()
    if device is not None:
        found["cuda"] = device.get_state()
    tracker = _tracker()
    for name, state in (tracker.get_states() if tracker is not None else {}).items():
        found[f"tracker {name}"] = state.get_state() if isinstance(state, torch.Generator) else state
    return found


def set_random_state(wanted: State) -> None:
    """Puts the generators into these states; those that are not named keep theirs."""
    setters = {"random": random.setstate, "numpy": numpy.random.set_state, "torch": torch.set_rng_state}
    for name, state in wanted.items():
        if name in setters:
            setters[name](state)
        elif name == "cuda":
            _device_generator().set_state(state)
        else:
            _set_tracked(_tracker(), name.removeprefix("tracker "), state)


def changed(before: State, after: State) -> dict[str, Any]:
    """Of `after`, the states that are not those of `before`."""
    return {
        name: state for name, state in after.items() if name not in before or not _same(before[name], state)
    }


class EvaluationState:
    """Lets evaluation draw without moving the random state of training.

    Micro-batches of training may have been drawn ahead when an evaluation starts, and a checkpoint may be saved after
    it: what evaluation draws must not come between the two.
    """

    def __init__(self) -> None:
        self._next: State | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around each part of an evaluation, which goes on where its last part stopped."""
        before = random_state()
        set_random_state(changed(before, before if self._next is None else self._next))
        try:
            yield
        finally:
            self._next = random_state()
            set_random_state(changed(self._next, before))

    def over(self) -> None:
        """The next evaluation starts from the random state of training."""
        self._next = None


class WhoDraws:
    """Who has moved which generator on this rank, and so whether micro-batches may be drawn ahead.

    They may where no generator is moved by both the data and something else, such as dropout: then the micro-batches
    are the same, drawn early or not. Where the data moves any, the first step is without: it shows who else does.
    """

    def __init__(self) -> None:
        self._by_data: set[str] = set()
        self._by_others: set[str] = set()
        self._seen_a_step = False
        self._shared: list[str] = []

    def end_step(self) -> None:
        """A whole step has been seen."""
        self._seen_a_step = True

    def data(self, generators: Iterable[str]) -> None:
        """Drawing a micro-batch moved these."""
        self._by_data.update(generators)

    def others(self, generators: Iterable[str]) -> None:
        """Between two draws of the data something else moved these."""
        self._by_others.update(generators)

    def may_draw_ahead(self) -> bool:
        shared = sorted(self._by_data & self._by_others)
        if shared and not self._shared:
            _log.warning(
                "credits is 0 from here on: the data iterator and something else in the training step, such as "
                "dropout, both draw from %s, so that micro-batches that are drawn early would differ, and with them a "
                "resumed run",
                names_of(shared),
            )
        self._shared = shared
        return not shared and (self._seen_a_step or not self._by_data)


def names_of(generators: list[str]) -> str:
    """For a sentence."""
    return f"the generator{'s' if len(generators) > 1 else ''} {', '.join(map(repr, generators))}"


def _device_generator() -> torch.Generator | None:
    if not torch.cuda.is_initialized():
        return None
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    # Under `vcrd.megatron.cpu` the device is the CPU, whose generator is saved as "torch".
    return None if generator is torch.default_generator else generator


def _tracker() -> Any:
    # Not by Megatron's function, which would make one where a script uses none.
    module = sys.modules.get("megatron.core.tensor_parallel.random")
    return getattr(module, "_CUDA_RNG_STATE_TRACKER", None)


def _set_tracked(tracker: Any, name: str, state: torch.Tensor) -> None:
    states = tracker.get_states()
    if isinstance(states.get(name), torch.Generator):  # CUDA graphs hold on to it
        states[name].set_state(state)
    else:
        tracker.set_states({**states, name: state})


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and any(isinstance(part, numpy.ndarray) for part in a):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
