"""A judge: the teacher after a further training on `hint % problem ? solution`. It sees a solution in its context."""

from __future__ import annotations

import dataclasses
import math
import random
import zlib
from pathlib import Path

import torch
from torch import Tensor

from data import Batch, batch_of
from models import Stack
from problems import END, Family, Problem
from train import Judge, Sizes, imitate, optimizer_of, paced, store

AFTER_HINT = "%"  # no family uses it
HINTS = ("right", "partial", "wrong", "none")
STEPS = 150  # training steps of a judge whose verdicts set weights
ACCEPTED = 4.0  # an action is valid if the judge gives its own at most so many times the probability


def hint_of(problem: Problem, rng: random.Random, kind: str) -> str:
    """A correct solution without its end; or cut at a random place; or with a wrong symbol of its class; or none."""
    if kind == "none":
        return ""
    text = problem.solution(rng).removesuffix(END)
    if kind == "partial":
        return text[: rng.randrange(len(text))]
    while kind == "wrong":
        place = rng.randrange(len(text))
        classes = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        others = next((symbols for symbols in classes if text[place] in symbols), "")
        if others:
            changed = text[:place] + rng.choice(others) + text[place + 1 :]
            if not problem.is_correct(changed + END):
                return changed
    return text


def hinted(problem: Problem, rng: random.Random, faulty: float | str) -> Problem:
    """The problem as a judge sees it. faulty: the share of hints that are partial or wrong, or the kind of all."""
    kind = faulty
    if not isinstance(kind, str):
        kind = rng.choice(HINTS[1:3]) if rng.random() < kind else HINTS[0]
    return dataclasses.replace(problem, prompt=hint_of(problem, rng, kind) + AFTER_HINT + problem.prompt)


def judge_of(before: Stack, family: Family, faulty: float, sizes: Sizes, steps: int, path: Path) -> Stack:
    """The model after so many steps in which this share of the hints is faulty. Stored in `path`."""
    judge = Stack(before.shape)
    if path.exists():
        judge.load_state_dict(torch.load(path))
        return judge
    judge.take(before, [0])
    rng, optimizer = random.Random(500), optimizer_of(judge, sizes.teacher_rate)
    for step in range(1, steps + 1):
        paced(optimizer, sizes.teacher_rate, step, steps, max(1, steps // 10))
        imitate(
            judge,
            optimizer,
            family,
            rng,
            sizes.teacher_batch,
            lambda problem, rng: hinted(problem, rng, faulty),
        )
    store(judge, path)
    return judge


def judge_for(teacher: Stack, family: Family, sizes: Sizes, path: Path) -> Judge:
    """The verdicts of a judge that sees one correct solution of each problem, always the same one."""
    judge = judge_of(teacher, family, 0.0, sizes, STEPS, path).to(teacher.device)

    @torch.no_grad()
    def valid(batch: Batch, student_action: Tensor, teacher_action: Tensor) -> tuple[Tensor, Tensor]:
        seen = [
            hinted(problem, random.Random(zlib.crc32(problem.prompt.encode())), "right")
            for problem in batch.problems
        ]
        with_hint = batch_of(seen, batch.solutions).to(batch.tokens.device)
        # The tokens that count are those of `batch`, in the same order.
        log_p = judge(with_hint.tokens[None])[0][with_hint.counts].log_softmax(-1)
        found = []
        for action in (student_action, teacher_action):
            its = log_p.gather(-1, action[batch.counts][:, None])[:, 0]
            verdict = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
            verdict[batch.counts] = (its >= log_p.amax(-1) - math.log(ACCEPTED)).float()
            found.append(verdict)
        return tuple(found)

    return valid
