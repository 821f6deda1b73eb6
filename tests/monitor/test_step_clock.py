"""The parts of a step, with a fake clock."""

from __future__ import annotations

import pytest

from vcrd.megatron import metrics


@pytest.fixture
def clock(monkeypatch):
    """(the clock, a function that advances it by seconds)."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return metrics.StepClock(), passes


def step(clock, passes, micro_batches: int) -> None:
    for _ in range(micro_batches):
        with clock.forward():
            passes(3)
        passes(5)  # backward
    clock.end_backward()
    passes(0.5)
    clock.end_step()


def test_every_second_from_the_first_step_on_belongs_to_one_part(clock):
    clock, passes = clock
    passes(50)  # before the first step
    step(clock, passes, 2)
    assert clock.parts == metrics.Parts(forward=6, backward=10, gradients=0.5, between=0)
    before = clock.parts
    passes(7)  # the optimizer
    step(clock, passes, 1)
    assert clock.parts.since(before) == metrics.Parts(forward=3, backward=5, gradients=0.5, between=7)


def test_a_forward_step_that_raises_is_counted(clock):
    clock, passes = clock
    with pytest.raises(KeyError), clock.forward():
        passes(2)
        raise KeyError
    assert clock.parts.forward == 2
