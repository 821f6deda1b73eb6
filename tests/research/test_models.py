"""A stack of models gives the results of single models."""

from __future__ import annotations

import random

import pytest
import torch

import data
import tasks
from models import Shape, Stack, generate

SHAPE = Shape(16, 2, 2, len(data.SYMBOLS))


def spread(count: int) -> Stack:
    """A stack whose models differ."""
    stack = Stack(SHAPE, count, seed=1)
    with torch.no_grad():
        for weight in stack.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return stack


def test_its_number_of_parameters_is_right():
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


def test_no_model_attends_to_later_tokens():
    stack = spread(1)
    tokens = torch.randint(2, 30, (1, 2, 8))
    changed = tokens.clone()
    changed[..., 5:] = 31
    assert torch.equal(stack(tokens)[..., :5, :], stack(changed)[..., :5, :])


def padded(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 2 to 6 tokens at the right, and the padding at their left."""
    padding = torch.tensor([[0, 2, 4], [1, 3, 0]])
    tokens = torch.randint(2, 30, (2, 3, 6), generator=torch.Generator().manual_seed(6))
    return torch.where(torch.arange(6) < padding[..., None], 0, tokens), padding


def test_generation_is_the_same_with_and_without_cache_and_padding():
    stack = spread(2)
    prompts, padding = padded(stack)
    found = generate(stack, prompts, padding, 8, end=-1)
    for model in range(2):
        alone = Stack(SHAPE)
        alone.take(stack, [model])
        for row in range(3):
            tokens = prompts[model, row, padding[model, row] :].view(1, 1, -1)
            for _ in range(8):
                tokens = torch.cat((tokens, alone(tokens)[:, :, -1].argmax(-1)[..., None]), -1)
            assert torch.equal(found[model, row], tokens[0, 0, -8:])


def test_rows_that_end_do_not_change_others():
    """They are dropped from the cache one after the other, and zeros follow."""
    stack = spread(2)
    prompts, padding = padded(stack)
    endless = generate(stack, prompts, padding, 30, end=-1)
    assert len(endless.unique()) > 5
    for end in endless.unique().tolist():
        found = generate(stack, prompts, padding, 30, end)
        for mine, whole in zip(found.view(6, 30), endless.view(6, 30), strict=True):
            places = (whole == end).nonzero()
            last = int(places[0]) + 1 if len(places) else 30
            assert torch.equal(mine[:last], whole[:last]) and not mine[last:].any()


def test_sampling_follows_the_probabilities_with_the_same_numbers_for_each_model():
    stack = Stack(SHAPE, 2, seed=1)
    stack.take(spread(1), [0, 0])
    prompts = torch.full((2, 4000, 3), 7)
    chances = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    first, second = generate(stack, prompts, torch.zeros(2, 4000, dtype=torch.int64), 1, -1, chances)[..., 0]
    assert torch.equal(first, second)
    expected = stack(prompts[:, :1])[0, 0, -1].softmax(-1)
    shares = torch.bincount(first, minlength=len(data.SYMBOLS)) / 4000
    assert (shares - expected).abs().max() < 0.04


def test_the_solutions_of_each_model_keep_their_order():
    stack = spread(2)
    problems = [data.draw(tasks.arithmetic, random.Random(seed), 7) for seed in (1, 2)]
    together = data.solved(stack, problems, 12)
    for number in range(2):
        alone = Stack(SHAPE)
        alone.take(stack, [number])
        for problem, text in zip(problems[number], together[number], strict=True):
            prompt = torch.tensor([[data.encode(problem.prompt)]])
            tokens = generate(alone, prompt, torch.zeros(1, 1, dtype=torch.int64), 12, data.STOP)
            expected = data.decode(tokens[0, 0].tolist())
            assert text == expected[: expected.find("$") + 1 or None].rstrip("\0")


def test_a_shape_must_fit():
    with pytest.raises(RuntimeError):
        Stack(Shape(16, 1, 3, 20))(torch.zeros(1, 1, 2, dtype=torch.int64))
