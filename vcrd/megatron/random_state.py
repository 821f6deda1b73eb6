"""The random state that Megatron saves in checkpoints, and whether the data or something else moves it."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch

State = Mapping[str, Any]  # state by generator

_log = logging.getLogger("vcrd")


def random_state() -> dict[str, Any]:
    """A snapshot of the states of the generators that `megatron.training` saves, by name.

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
    """Sets the generators to these states. Generators that are not named keep theirs."""
    setters = {"random": random.setstate, "numpy": numpy.random.set_state, "torch": torch.set_rng_state}
    for name, state in wanted.items():
        if name in setters:
            setters[name](state)
        elif name == "cuda":
            _device_generator().set_state(state)
        else:
            _set_tracked(_tracker(), name.removeprefix("tracker "), state)


def changed(before: State, after: State) -> dict[str, Any]:
    """The states in `after` that differ from those in `before`."""
    return {
        name: state for name, state in after.items() if name not in before or not _same(before[name], state)
    }


class EvaluationState:
    """Lets evaluation draw without moving the random state of training.

    Micro-batches of training may have been drawn ahead when an evaluation starts, and a checkpoint may be saved after
    it. What evaluation draws must not change that checkpoint.
    """

    def __init__(self) -> None:
        self._next: State | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around each part of an evaluation, which continues with the random state of its last part."""
        before = random_state()
        set_random_state(changed(before, before if self._next is None else self._next))
        try:
            yield
        finally:
            self._next = random_state()
            set_random_state(changed(self._next, before))

    def end(self) -> None:
        """The next evaluation starts from the random state of training."""
        self._next = None


class WhoDraws:
    """Which generators the data and other code have moved on this rank, and so whether to draw micro-batches ahead.

    That is allowed if no generator is moved both by the data and by something else, such as dropout: micro-batches are
    then the same, drawn early or not. If the data moves any, nothing is drawn ahead in the first step, which shows
    what else moves them.
    """

    def __init__(self) -> None:
        self._by_data: set[str] = set()
        self._by_others: set[str] = set()
        self._seen_a_step = False
        self._shared: list[str] = []

    def end_step(self) -> None:
        """One whole step has been observed."""
        self._seen_a_step = True

    def data(self, generators: Iterable[str]) -> None:
        """Drawing a micro-batch moved these generators."""
        self._by_data.update(generators)

    def others(self, generators: Iterable[str]) -> None:
        """Something else moved these generators between two draws of the data."""
        self._by_others.update(generators)

    def may_draw_ahead(self) -> bool:
        shared = sorted(self._by_data & self._by_others)
        if shared and not self._shared:
            _log.warning(
                "credits is 0 from now on: the data iterator and something else in the training step, such as dropout, "
                "both draw from %s, so that micro-batches drawn early would differ, and with them a resumed run",
                names_of(shared),
            )
        self._shared = shared
        return not shared and (self._seen_a_step or not self._by_data)


def names_of(generators: list[str]) -> str:
    """The names, for a message."""
    return f"the generator{'s' if len(generators) > 1 else ''} {', '.join(map(repr, generators))}"


def _device_generator() -> torch.Generator | None:
    if not torch.cuda.is_initialized():
        return None
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    # Under `vcrd.megatron.cpu` the device is the CPU, whose generator is saved as "torch".
    return None if generator is torch.default_generator else generator


def _tracker() -> Any:
    # Not through Megatron's function, which would create one in a script that uses none.
    module = sys.modules.get("megatron.core.tensor_parallel.random")
    return getattr(module, "_CUDA_RNG_STATE_TRACKER", None)


def _set_tracked(tracker: Any, name: str, state: torch.Tensor) -> None:
    states = tracker.get_states()
    if isinstance(states.get(name), torch.Generator):  # CUDA graphs keep this object
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
