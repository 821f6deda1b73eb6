"""Looking ahead leaves no trace: samples, random state and a loader's own state are those of a run without it."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from megatron.core.rerun_state_machine import RerunDataIterator

from vcrd.megatron.prefetch import Prefetcher
from vcrd.megatron.random_state import (
    EvaluationState,
    WhoDraws,
    changed,
    random_state,
    set_random_state,
)
from vcrd.megatron.remote_teacher import RemoteTeacher
from vcrd.settings import DistillSettings

_DRAW = {
    "torch": lambda: int(torch.randint(1000, ())),
    "numpy": lambda: int(numpy.random.randint(1000)),
    "random": lambda: random.randrange(1000),
}
_DRAW["each"] = lambda: _DRAW["torch"]() + _DRAW["numpy"]() + _DRAW["random"]()
_DRAW["none"] = lambda: 0
# A cached second normal number is a part of the state too.
_DRAW["normal"] = lambda: (
    int(1000 * (random.gauss(0, 1) + numpy.random.standard_normal())) + int(1000 * torch.randn(()))
)


class Drawing:
    """Micro-batch n holds n and a number that is drawn from a generator; its state is a dictionary that changes."""

    def __init__(self, draw: str, start: int = 0, size: int = 10**6) -> None:
        self._draw, self._size, self._state = _DRAW[draw], size, {"next": start}

    def __iter__(self):
        return self

    def __next__(self):
        if self._state["next"] == self._size:
            raise StopIteration
        self._state["next"] += 1
        return {"tokens": torch.tensor([[self._state["next"] - 1, self._draw()]])}


class Saving(Drawing):
    def save_state(self) -> dict[str, int]:
        return self._state


def look_ahead(source, ahead: int, who_draws: WhoDraws | None = None) -> Prefetcher:
    return Prefetcher(source, lambda question: 0, ahead, "tokens", who_draws)


def sample(iterator) -> list[int]:
    return next(iterator)["tokens"][0].tolist()


def seed(number: int = 5) -> None:
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def run(iterator, steps: int, who_draws: WhoDraws | None = None, dropout: str = "none") -> tuple[list, list]:
    """Samples of steps of two micro-batches, and the random state at the end of each step."""
    samples, states = [], []
    for _ in range(steps):
        for _ in range(2):
            samples.append(sample(iterator))
            _DRAW[dropout]()
        if who_draws is not None:
            who_draws.end_step()
        states.append(random_state())
    return samples, states


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("draw", _DRAW)
def test_at_each_step_the_random_state_is_that_of_a_run_without_looking_ahead(draw, ahead):
    seed()
    samples, states = run(iter(Drawing(draw)), 4)
    for who_draws in (None, WhoDraws()):
        seed()
        iterator = look_ahead(Drawing(draw), ahead, who_draws)
        again, states_again = run(iterator, 4, who_draws)
        assert again == samples and iterator.pending == ahead
        assert not any(changed(one, other) for one, other in zip(states, states_again, strict=True))
    # And so a run that resumes, at any step, draws the same.
    for step, state in enumerate(states_again[:-1], 1):
        set_random_state(state)
        resumed, _ = run(look_ahead(Drawing(draw, start=2 * step), ahead), 4 - step)
        assert resumed == samples[2 * step :]


def test_the_end_of_the_data_moves_no_generator_early():
    seed()
    samples, states = run(iter(Drawing("each", size=4)), 2)
    seed()
    iterator = look_ahead(Drawing("each", size=4), 7)
    assert run(iterator, 2)[0] == samples and not changed(states[-1], random_state())
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("dropout", ["torch", "numpy", "each"])
def test_nothing_is_drawn_ahead_where_dropout_moves_the_same_generator(dropout, caplog):
    seed()
    samples, states = run(iter(Drawing("each")), 4, dropout=dropout)
    seed()
    who_draws = WhoDraws()
    iterator = look_ahead(Drawing("each"), 2, who_draws)
    again, states_again = run(iterator, 4, who_draws, dropout)
    assert again == samples and iterator.pending == 0
    assert not any(changed(one, other) for one, other in zip(states, states_again, strict=True))
    assert len(caplog.records) == 1 and "credits is 0 from now on" in caplog.text
    assert (f"'{dropout}'" if dropout != "each" else "'numpy', 'random', 'torch'") in caplog.text


@pytest.mark.parametrize("draw", ["none", "random"])
def test_dropout_from_a_generator_that_the_data_leaves_alone_is_no_reason_to_wait(draw):
    seed()
    samples, states = run(iter(Drawing(draw)), 4, dropout="torch")
    seed()
    who_draws = WhoDraws()
    iterator = look_ahead(Drawing(draw), 3, who_draws)
    assert run(iterator, 4, who_draws, "torch")[0] == samples and iterator.pending == 3
    assert not changed(states[-1], random_state())


def test_what_draws_between_two_steps_alone_is_seen_before_anything_is_drawn_ahead():
    def run_logging(iterator, who_draws: WhoDraws) -> list:
        found = []
        for _ in range(4):
            found += run(iterator, 1, who_draws)[0]
            random.random()
        return found

    seed()
    samples = run_logging(iter(Drawing("random")), WhoDraws())
    seed()
    who_draws = WhoDraws()
    assert run_logging(look_ahead(Drawing("random"), 2, who_draws), who_draws) == samples


def test_a_generator_that_something_else_moves_now_and_then_is_one_sentence():
    """Seen too late: what was drawn ahead is not what a run without looking ahead, or a resumed one, would draw."""
    seed()
    who_draws = WhoDraws()
    iterator = look_ahead(Drawing("numpy"), 2, who_draws)
    run(iterator, 2, who_draws)
    numpy.random.rand()
    with pytest.raises(
        ValueError, match="credits: expected 0 where .*, got 2; .* from the generator 'numpy'"
    ):
        next(iterator)


def test_the_states_of_megatrons_tracker_are_put_back_too(monkeypatch):
    tracker = SimpleNamespace(states={"model-parallel-rng": torch.tensor([1]), "other": torch.tensor([7])})
    tracker.get_states = lambda: dict(tracker.states)
    tracker.set_states = lambda states: setattr(tracker, "states", states)
    module = SimpleNamespace(_CUDA_RNG_STATE_TRACKER=tracker)
    monkeypatch.setitem(sys.modules, "megatron.core.tensor_parallel.random", module)

    def draw_from_tracker():
        for number in range(9):
            tracker.states = {
                **tracker.states,
                "model-parallel-rng": tracker.states["model-parallel-rng"] + 1,
            }
            yield {"tokens": torch.tensor([[number, int(tracker.states["model-parallel-rng"])]])}

    iterator = look_ahead(draw_from_tracker(), 3)
    for number in range(6):
        tracker.states["other"] = tracker.states["other"] * 2  # the model's own
        assert sample(iterator) == [number, number + 2]
        assert tracker.states == {"model-parallel-rng": number + 2, "other": 7 * 2 ** (number + 1)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_devices_generator_is_put_back_too():
    def draw_on_device():
        for number in range(9):
            yield {"tokens": torch.tensor([[number, int(torch.randint(1000, (), device="cuda"))]])}

    torch.cuda.manual_seed(3)
    samples, states = run(draw_on_device(), 3)
    torch.cuda.manual_seed(3)
    again, states_again = run(look_ahead(draw_on_device(), 2), 3)
    assert again == samples and "cuda" in states[0]
    assert not any(changed(one, other) for one, other in zip(states, states_again, strict=True))
    assert changed(states[0], states[1]).keys() == {"cuda"}


def test_evaluation_leaves_the_random_state_of_training_and_draws_anew_each_time():
    seed()
    before, evaluation = random_state(), EvaluationState()
    drawn = []
    for _ in range(2):
        with evaluation.aside():
            drawn.append([_DRAW["each"]() for _ in range(3)])
        assert not changed(before, random_state())
    assert drawn[0] != drawn[1], "its second part goes on after its first"
    evaluation.end()
    with evaluation.aside():
        assert [_DRAW["each"]() for _ in range(3)] == drawn[0], "a resumed run evaluates alike"


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_loaders_own_state_is_that_of_what_was_handed_out(ahead):
    iterator = look_ahead(Saving("torch"), ahead)
    assert iterator.save_state() == {"next": 0}
    for number in range(5):
        assert sample(iterator)[0] == number and iterator.pending == ahead
        assert iterator.save_state() == {"next": number + 1}
    assert not hasattr(look_ahead(Drawing("torch"), ahead), "save_state")


@pytest.mark.parametrize("step_size", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3])
def test_a_loaders_own_state_is_taken_for_the_ends_of_steps_alone(ahead, step_size):
    """With Energon's workers each one takes a while."""
    taken = []

    class Counting(Saving):
        def save_state(self):
            taken.append(self._state["next"])
            return super().save_state()

    iterator = Prefetcher(Counting("none"), lambda question: 0, ahead, "tokens", None, lambda: step_size)
    for step in range(1, 5):
        for number in range(step_size):
            if step == 1 and number:
                with pytest.raises(RuntimeError, match=f"save_state: .* a step of {step_size} micro-batches"):
                    iterator.save_state()
            sample(iterator)
        assert iterator.save_state() == {"next": step * step_size}
        iterator.begin_step()
    within = 4 * max(step_size - ahead, 0) + min(step_size, ahead)
    assert len(taken) == 4 * step_size + ahead - within


def linked_teacher() -> RemoteTeacher:
    """Asks a link that only counts."""
    teacher = RemoteTeacher(DistillSettings().replaced(credits=2), "tokens")
    numbers = iter(range(10**6))
    teacher._late = False  # as after the first micro-batch
    teacher._layout = SimpleNamespace(asks=True, tensor_size=1, context_size=1)
    teacher._teachers = SimpleNamespace(request=lambda question: next(numbers), close=lambda: None)
    return teacher


class Stateful(Drawing):
    """As an iterator of torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, int]:
        return self._state


@pytest.mark.parametrize("source", [Saving("none"), Stateful("none"), RerunDataIterator(Stateful("none"))])
def test_nothing_is_drawn_ahead_of_a_loader_whose_state_the_script_saves_by_itself(source, caplog):
    teacher = linked_teacher()
    inner = getattr(source, "iterable", source)
    for number in range(1, 4):
        sample(teacher.watched(source))
        assert inner._state == {"next": number}
    assert caplog.text.count("credits is 0 for this data iterator") == 1
    assert type(inner).__name__ in caplog.text
    teacher.close()
    assert getattr(source, "iterable", source) is inner


def test_megatrons_iterator_has_its_own_source_again_once_another_comes_or_the_plug_is_closed(caplog):
    teacher, source = linked_teacher(), Saving("none", size=3)
    first, second = RerunDataIterator(source), RerunDataIterator(Saving("none"))
    assert [sample(teacher.watched(first))[0] for _ in range(3)] == [0, 1, 2]
    assert first.iterable is not source and first.iterable.save_state() == {"next": 3}
    sample(teacher.watched(second))
    assert first.iterable is source and second.iterable.save_state() == {"next": 1}
    teacher.close()
    assert isinstance(second.iterable, Saving) and not first.replaying
    assert "2 micro-batches were drawn ahead and not trained on" in caplog.text
    teacher.close()


def test_an_iterator_that_someone_else_has_wrapped_since_is_left_alone():
    teacher, iterator = linked_teacher(), RerunDataIterator(Saving("none"))
    sample(teacher.watched(iterator))
    iterator.iterable = wrapped = map(dict, iterator.iterable)
    teacher.close()
    assert iterator.iterable is wrapped


def test_an_iterator_of_one_step_is_not_drawn_beyond_it():
    """As the iterators that Megatron-Bridge makes for each step, over one that goes on."""
    source, asked = Drawing("none"), []
    for step in range(2):
        ahead = Prefetcher(
            source, lambda question: asked.append(question.tokens), 2, "tokens", None, lambda: 4
        )
        ahead.in_step = True
        for drawn in range(4):
            assert sample(ahead)[0] == 4 * step + drawn
            assert len(asked) == 4 * step + min(drawn + 3, 4)
        assert ahead.pending == 0
