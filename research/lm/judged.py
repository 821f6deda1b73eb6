"""How well the estimators of validity that need no verifier agree with the exact one, for this teacher.

As in privileged.py: at each prefix of sampled solutions, up to the first wrong token, both models propose their most
probable token. The verifier says whether a correct solution continues with it. The AUROC of a score is the chance that
it is higher for a valid proposal than for another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import vcrd
from estimators import ESTIMATORS
from lm.losses import REGIMES
from lm.training import Decoder, Setting, frozen
from methods import OWN
from privileged import ABOUT, Proposals, drawn_aurocs, interval, together
from vcrd.loss import reference

PLAIN = "the teacher's own probability"
NAMES = (*ESTIMATORS, PLAIN)
Found = dict[str, list[Proposals]]  # by regime; one for each family


@torch.no_grad()
def measured(setting: Setting, teacher: Decoder, student: Decoder, seed: int) -> Found:
    """Of half of the held-out problems, with the student before its distillation."""
    student = frozen(student)
    tasks = setting.held_out[: len(setting.held_out) // 2]
    chances = torch.rand(len(tasks), setting.length, generator=torch.Generator().manual_seed(9000 + seed))
    found: Found = {}
    for regime in REGIMES:
        solutions = setting.solved(student if regime == OWN else teacher, tasks, chances)
        parts = []
        for first in range(0, len(tasks), setting.sizes.together):
            its = slice(first, first + setting.sizes.together)
            parts.append(_proposals(setting, teacher, student, regime, tasks[its], solutions[its], first))
        found[regime] = [together([part[family] for part in parts]) for family in range(len(parts[0]))]
        for each in found[regime]:
            each.problem += len(tasks) * seed
    return found


def _proposals(
    setting: Setting, teacher, student, regime: str, tasks, solutions, first: int
) -> list[Proposals]:
    rows = setting.rows(tasks, solutions)
    p, q = (setting.logits(model, rows) for model in (teacher, student))
    written = rows.written.to(setting.device)
    # The student's own samples have no verified token, so all that it wrote count.
    labels = torch.where(rows.valid(written) | (regime == OWN), written, -1)
    stats = vcrd.vocab_parallel_divergence(q, p, labels)
    scores = {name: reference.log_validities(stats._asdict(), name) for name in ESTIMATORS}
    scores[PLAIN] = (stats.teacher_logprob_of_student_action, stats.teacher_logprob_of_teacher_action)
    valid = {"student": rows.valid(stats.student_action), "teacher": rows.valid(stats.teacher_action)}
    problem = torch.arange(len(tasks))[:, None].expand_as(rows.counts)[rows.counts]
    family = torch.tensor([task.family for task in tasks])[problem]
    found = []
    for number in range(len(setting.sizes.families)):
        those = (rows.unbroken() & (family == number)).numpy()
        found.append(
            Proposals(
                (problem + first).numpy()[those],
                {name: each.cpu().numpy()[those] for name, each in valid.items()},
                {
                    name: tuple(each.double().cpu().numpy()[those] for each in pair)
                    for name, pair in scores.items()
                },
            )
        )
    return found


def summary(seeds: Sequence[Found]) -> dict:
    """By regime and by what is judged: the mean AUROC over the families that have both kinds of proposals."""
    content: dict[str, dict] = {}
    for regime in REGIMES if seeds else ():
        content[regime] = {}
        families = range(len(seeds[0][regime]))
        parts = [together([found[regime][number] for found in seeds]) for number in families]
        for what in ABOUT:
            rng = np.random.default_rng(0)
            each, counts = [], np.zeros(2, dtype=int)
            for those in parts:
                values, valid, wrong = drawn_aurocs(those, what, rng)
                counts += valid, wrong
                if values:
                    each.append(values)
            content[regime][what] = {
                "valid": int(counts[0]),
                "wrong": int(counts[1]),
                "families": len(each),
                "auroc": {
                    name: interval(np.mean([values[name] for values in each], 0)) for name in NAMES if each
                },
            }
    return content
