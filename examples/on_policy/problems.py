"""The problems, their verifier, and samples as micro-batches of Megatron."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from examples.verified.arithmetic import PADDING, Chain, encode

OPERATIONS, LARGEST = 3, 4  # 16,875 problems
LENGTH = 40  # tokens of a prompt and its response; a right response that takes one operation a step needs 35


def draw(count: int, generator: torch.Generator, held_out: bool = False) -> list[Chain]:
    """Random problems. A fifth of all problems, by their text, is held out: training never draws them."""
    found: list[Chain] = []
    while len(found) < count:
        chain = Chain.draw(generator, OPERATIONS, LARGEST)
        if (zlib.crc32(chain.prompt.encode()) % 5 == 0) == held_out:
            found.append(chain)
    return found


def solution(chain: Chain) -> str:
    """A right response, of one operation a step. The verifier accepts others: longer steps, and swapped operands."""
    text = ""
    while steps := chain.steps():
        step, chain = next(iter(steps.items()))
        text += step
    return text + "."


def right_steps(chain: Chain, response: str) -> list[bool | None]:
    """Of each symbol: whether its step is right, by the verifier; None after the first wrong step.

    A response that stops inside a step, or before the full stop, ends with a wrong step.
    """
    found: list[bool | None] = []
    rest: Chain | None = chain
    for step in response.replace(";", "; ").split():
        if rest is None:
            found += [None] * len(step)
            continue
        rest = rest if step == "." and not rest.operations else rest.steps().get(step)
        found += [rest is not None] * len(step)
    return found


def is_right(chain: Chain, response: str) -> bool:
    """Whether the response is complete and every step of it is right."""
    return response.endswith(".") and all(right_steps(chain, response))


def micro_batches(
    problems: Sequence[Chain],
    responses: Sequence[str],
    size: int,
    teacher_validity: float | None = None,
    hints: Sequence[str] = (),
) -> list[dict[str, Tensor]]:
    """Micro-batches of `size` samples, with Megatron's keys [size, LENGTH]; the loss is on the responses alone. With
    `hints`, texts before the prompts, of up to LENGTH tokens, the rows have 2 LENGTH tokens.

    With `teacher_validity`, how often the teacher's steps are right, also the scores of the steps: the student's
    validity is 1 in a right step and 0 in the first wrong one. In later steps nothing can be right any more, so both
    are equally valid there.
    """
    rows = [
        _row(chain, response, teacher_validity, hint)
        for chain, response, hint in zip(problems, responses, hints or [None] * len(problems), strict=True)
    ]
    return [
        {key: torch.stack([row[key] for row in rows[first : first + size]]) for key in rows[0]}
        for first in range(0, len(rows), size)
    ]


def _row(chain: Chain, response: str, teacher_validity: float | None, hint: str | None) -> dict[str, Tensor]:
    length, begin = (LENGTH, chain.prompt) if hint is None else (2 * LENGTH, hint + chain.prompt)
    text = encode(begin + response)
    whole = torch.full((length + 1,), PADDING)
    whole[: len(text)] = torch.tensor(text)
    # Position j predicts token j + 1, so the first token of the response is the label of the last one of the prompt.
    spoken = slice(len(begin) - 1, len(text) - 1)

    def spread(values: list[float], default: float) -> Tensor:
        row = torch.full((length,), default)
        row[spoken] = torch.tensor(values)
        return row

    row = {
        "tokens": whole[:-1],
        "labels": whole[1:],
        "loss_mask": spread([1.0] * len(response), 0.0),
    }
    if teacher_validity is not None:
        right = right_steps(chain, response)
        scores = {
            "student": [teacher_validity if each is None else float(each) for each in right],
            "teacher": [teacher_validity] * len(right),
        }
        row |= {f"vcrd_{name}_validity": spread(scores[name], 1.0) for name in scores}
    return row
