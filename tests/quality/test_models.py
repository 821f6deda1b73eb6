"""A stack of models is as many models alone."""

from __future__ import annotations

import random

import data
import pytest
import tasks
import torch
from models import Shape, Stack, generate

SHAPE = Shape(16, 2, 2, len(data.SYMBOLS))


def spread(count: int) -> Stack:
    """A stack whose models differ."""
    stack = Stack(SHAPE, count, seed=1)
    with torch.no_grad():
        for weight in stack.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return stack


def test_its_size_is_what_it_says():
    assert sum(weight.numel() for weight in Stack(SHAPE, 3).parameters()) == 3 * SHAPE.parameters


def test_logits_and_gradients_are_those_of_each_model_alone():
    stack = spread(3)
    tokens = torch.randint(2, 30, (3, 4, 9))
    together = stack(tokens)
    together.square().sum().backward()
    for number in range(3):
        alone = Stack(SHAPE)
        alone.take(stack, [number])
        logits = alone(tokens[number : number + 1])
        assert torch.allclose(logits[0], together[number], atol=1e-5)
        logits.square().sum().backward()
        for mine, theirs in zip(alone.parameters(), stack.parameters(), strict=True):
            scale = mine.grad.abs().max()
            assert torch.allclose(mine.grad[0] / scale, theirs.grad[number] / scale, atol=1e-5)


def test_no_model_sees_what_comes_later():
    stack = spread(1)
    tokens = torch.randint(2, 30, (1, 2, 8))
    changed = tokens.clone()
    changed[..., 5:] = 31
    assert torch.equal(stack(tokens)[..., :5, :], stack(changed)[..., :5, :])


def test_generation_with_a_cache_is_that_without():
    stack = spread(2)
    prompts = torch.randint(2, 30, (2, 3, 5))
    found = generate(stack, prompts, 6, end=-1)
    tokens = prompts
    for _ in range(6):
        tokens = torch.cat((tokens, stack(tokens)[:, :, -1].argmax(-1, keepdim=True)), -1)
    assert torch.equal(found, tokens)


def test_sampling_draws_by_the_models_chances():
    stack = spread(1)
    prompts = torch.full((1, 4000, 3), 7)
    drawn = generate(stack, prompts, 1, -1, 1.0, torch.Generator().manual_seed(0))[0, :, 3]
    chances = stack(prompts[:, :1])[0, 0, -1].softmax(-1)
    shares = torch.bincount(drawn, minlength=len(data.SYMBOLS)) / 4000
    assert (shares - chances).abs().max() < 0.04


def test_each_models_solutions_come_back_in_their_order():
    stack = spread(2)
    problems = [data.draw(tasks.arithmetic, random.Random(seed), 7) for seed in (1, 2)]
    together = data.solved(stack, problems, 12)
    for number in range(2):
        alone = Stack(SHAPE)
        alone.take(stack, [number])
        for problem, text in zip(problems[number], together[number], strict=True):
            tokens = generate(alone, torch.tensor([[data.encode(problem.prompt)]]), 12, data.STOP)
            expected = data.decode(tokens[0, 0, len(problem.prompt) :].tolist())
            assert text == expected[: expected.find("$") + 1 or None].rstrip("\0")


def test_a_shape_must_fit():
    with pytest.raises(RuntimeError):
        Stack(Shape(16, 1, 3, 20))(torch.zeros(1, 1, 2, dtype=torch.int64))
