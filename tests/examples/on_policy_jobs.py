"""What each process of the tests of examples/on_policy does, in Megatron's parallel state on the CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from jobs import STUDENT, TRUE_VOCAB, weights

LENGTH, END = 14, 7
PROMPTS = [[3, 11, 4], [9, 2, 30, 41, 5], [44], [8, 8], [3, 11, 4], [0, 1, 2, 3]]


def model() -> torch.nn.Module:
    """This rank's part of a model with fixed weights, in float64, so that layouts and caches round to equal tokens."""
    from examples.demo.convert import load
    from examples.demo.model import build, configure

    config = replace(configure(STUDENT, STUDENT.layers), pipeline_dtype=torch.float64)
    part = build(STUDENT, config, LENGTH)
    load(part, weights(STUDENT, 1).__getitem__, STUDENT, range(STUDENT.layers))
    return part.double()


def samples(temperature: float, seed: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    from examples.on_policy.sampling import sample

    part = model()
    found = sample(part, prompts, LENGTH, END, vocab_size=TRUE_VOCAB, temperature=temperature, seed=seed)
    assert part.training
    return found


def refusals() -> list[str]:
    """What `sample` says about prompts and models that it does not take."""
    from examples.on_policy.sampling import sample

    part, found = model(), []
    for prompts, name, value in (
        ([], None, None),
        ([[1], []], None, None),
        ([[1], [2] * LENGTH], None, None),
        (PROMPTS, "sequence_parallel", True),
        (PROMPTS, "context_parallel_size", 2),
    ):
        if name is not None:
            before = getattr(part.config, name)
            setattr(part.config, name, value)
        try:
            sample(part, prompts, LENGTH, END, vocab_size=TRUE_VOCAB)
            found.append("nothing")
        except ValueError as error:
            found.append(str(error))
        if name is not None:
            setattr(part.config, name, before)
    return found


def many_samples(options: list[tuple[float, int]]) -> list[list[list[int]]]:
    return [samples(*each) for each in options]


def step_by_step(temperature: float, seed: int) -> list[list[int]]:
    """The same in one process: each row alone, from the whole prefix, without a cache."""
    part = model().eval()
    chances = torch.rand(
        len(PROMPTS), LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    found = []
    for prompt, row in zip(PROMPTS, chances, strict=True):
        tokens = list(prompt)
        while len(tokens) < LENGTH and (len(tokens) == len(prompt) or tokens[-1] != END):
            with torch.no_grad():
                logits = part(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[
                    0, -1, :TRUE_VOCAB
                ]
            if temperature == 0:
                tokens.append(int(logits.argmax()))
            else:
                sums = (logits / temperature).softmax(-1).cumsum(-1)
                tokens.append(int(torch.searchsorted(sums, row[len(tokens)], right=True)))
        found.append(tokens[len(prompt) :])
    return found


def both(options: list[tuple[float, int]]) -> tuple[list[tuple], list[str]]:
    """Of each option, the samples and what they should be; and the refusals."""
    return [(samples(*each), step_by_step(*each)) for each in options], refusals()


def resumed(method_name: str) -> SimpleNamespace:
    """Two rounds in one run; and the second one in another run, from what the first run saved after one round."""
    from examples.on_policy import train

    teacher, about, sizes = _teacher()
    method = next(each for each in train.METHODS if each.name == method_name)

    def new() -> train.Distillation:
        return train.Distillation(method, teacher, about, 1, sizes)

    def parts(run: train.Distillation) -> tuple:
        return run.learner.model, run.learner.optimizer, run.learner.schedule

    whole = new()
    whole.round(0)
    saved = [_copied(each.state_dict()) for each in parts(whole)]
    figures = whole.plug.report.take()
    whole.round(1)
    whole.plug.close()
    again = new()
    for each, state in zip(parts(again), saved, strict=True):
        each.load_state_dict(state)
    again.round(1)
    again.plug.close()
    return SimpleNamespace(
        figures=figures,
        moved=_differences(whole.learner.model.state_dict(), saved[0]),
        differences=_differences(whole.learner.model.state_dict(), again.learner.model.state_dict()),
    )


def _teacher() -> tuple:
    """Untrained, what is known of it, and sizes."""
    from examples.on_policy import train

    model = train.Learner(train.shape(*train.QUICK.teacher), 5, 0.0, 10).model.eval().requires_grad_(False)
    return model, train.Teacher(solved=0.5, right_steps=0.8), train.QUICK


def _copied(state: object) -> object:
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


def _differences(one: dict, other: dict) -> int:
    """The number of parameters that differ in any bit."""
    return sum(not torch.equal(one[key], other[key]) for key in one if isinstance(one[key], torch.Tensor))


def two_rounds(settings: object | None) -> dict[str, torch.Tensor]:
    """The student's weights after two rounds on its own samples. settings: for a linked teacher; None: colocated."""
    from examples.on_policy import train
    from vcrd.megatron import distill

    teacher, about, sizes = _teacher()
    method = next(each for each in train.METHODS if each.name == "on-policy, scores")
    run = train.Distillation(method, teacher, about, 1, sizes)
    if settings is not None:
        run.plug = distill(train.forward_step, settings)
    for number in range(2):
        run.round(number)
    run.plug.close()
    return {key: value for key, value in run.learner.model.state_dict().items() if value is not None}


def teacher_job(settings: object) -> int:
    from vcrd.megatron import serve

    return serve(_teacher()[0], settings)
