"""CHAMP problems with human-written solutions as token sequences in the chat template, with marked steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT_EVERY = 9  # one problem in nine, the same ones in every run
_ROUND = 32  # sequence lengths are rounded up to a multiple of this, so that micro-batches share shapes


@dataclass(frozen=True)
class Problem:
    """tokens: problem and solution in the chat template. steps: for each token the number of its step in the solution,
    -1 in the prompt."""

    name: str
    tokens: list[int]
    steps: list[int]


def tokenize(tokenizer, name: str, text: str, steps: Sequence[str]) -> Problem:
    """A problem as the question of the user, and its steps, one per line, as the answer of the assistant."""
    question = {"role": "user", "content": text}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    answer = {"role": "assistant", "content": "\n".join(steps)}
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(f"{name}: expected the chat template to continue the prompt")
    encoded = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=False)
    ends, end = [], len(prompt)
    for step in steps:
        end += len(step) + 1  # with the following line break
        ends.append(end)
    ids = []
    for start, _ in encoded["offset_mapping"]:
        step = next((number for number, end in enumerate(ends) if start < end), len(steps) - 1)
        ids.append(-1 if start < len(prompt) else step)
    # The template's text after the end mark of the answer belongs to no step.
    while whole[encoded["offset_mapping"][len(ids) - 1][0] :].isspace():
        ids.pop()
    return Problem(name, list(encoded["input_ids"])[: len(ids)], ids)


def split(problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(for training, held out): a fixed split that mixes the categories."""
    held_out = list(problems[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    names = {problem.name for problem in held_out}
    return [problem for problem in problems if problem.name not in names], held_out


def micro_batch(problems: Sequence[Problem], longest: int) -> dict[str, Tensor]:
    """tokens, labels, steps int64 [b, s] and loss_mask float32 [b, s]; longer problems are cut at `longest`.

    A position's label, step and mask are those of the token that follows it. Prompt and padding are masked out.
    """
    length = min(longest, max(len(problem.tokens) - 1 for problem in problems))
    length = min(longest, -(-length // _ROUND) * _ROUND)
    tokens, labels = torch.zeros(2, len(problems), length, dtype=torch.int64).unbind(0)
    steps = torch.full_like(tokens, -1)
    for row, problem in enumerate(problems):
        size = min(length, len(problem.tokens) - 1)
        tokens[row, :size] = torch.tensor(problem.tokens[:size])
        labels[row, :size] = torch.tensor(problem.tokens[1 : size + 1])
        steps[row, :size] = torch.tensor(problem.steps[1 : size + 1])
    return {"tokens": tokens, "labels": labels, "steps": steps, "loss_mask": (steps >= 0).float()}


def training_steps(
    problems: Sequence[Problem], steps: int, micro_batches: int, size: int, longest: int, seed: int = 0
) -> Iterator[list[dict[str, Tensor]]]:
    """For each step, micro-batches of `size` problems with similar lengths, for little padding."""
    shuffle = random.Random(seed)
    per_step = micro_batches * size
    groups: list[list[Problem]] = []
    for _ in range(steps):
        if not groups:
            # A step has problems with neighbouring lengths. Noise in the order changes the neighbours in each epoch.
            order = sorted(problems, key=lambda p: min(len(p.tokens), longest) + shuffle.uniform(0, 24))
            groups = [order[i : i + per_step] for i in range(0, len(order) - per_step + 1, per_step)]
            shuffle.shuffle(groups)
        group = groups.pop()
        yield [micro_batch(group[i : i + size], longest) for i in range(0, per_step, size)]


def held_out_batches(
    problems: Sequence[Problem], size: int, longest: int
) -> list[tuple[list[Problem], dict]]:
    """Micro-batches for evaluation, each with the problems in it; sorted by length."""
    order = sorted(problems, key=lambda p: len(p.tokens))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [(group, micro_batch(group, longest)) for group in groups]
