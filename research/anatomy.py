"""Before training: the tokens where the two models differ in validity, and the places of the divergence.

    python research/anatomy.py --out evidence

Reads the teachers and students that run.py has trained in OUT, and writes OUT/anatomy.json. For each task and seed it
uses solutions of 256 problems that are not held out, sampled from the teacher and from the student.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))

import vcrd
from configs import CONFIGS
from data import batch_of, draw, solved, unbroken, verdicts
from methods import OWN, TRACES
from models import Stack
from runs import TASKS, family_of, trained
from tables import TITLES, table
from train import Sizes, longest

ROWS = {
    "after": "tokens after the first error",
    "teacher": "teacher's proposals that are valid, before it",
    "student": "student's proposals that are valid, before it",
    "differ": "tokens where one proposal is valid and the other is not",
    "label": "tokens whose weight by label is below 0.9 or above 1.1",
    "forward_kl": "share of the forward KL that lies after the first error",
    "jsd": "share of the JSD that lies after the first error",
    "forward_kl_wrong": "share of the forward KL where the teacher's proposal is not valid, before it",
    "jsd_wrong": "share of the JSD where the teacher's proposal is not valid, before it",
}


@torch.no_grad()
def shares(teacher: Stack, student: Stack, family, regime: str, seed: int, problems: int) -> dict[str, float]:
    """Values by the names of ROWS, within 0..1."""
    asked = draw(family, random.Random(9000 + seed), problems)
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(len(asked), longest(asked), generator=generator)
    (texts,) = solved(teacher if regime == TRACES else student, [asked], chances.shape[1], chances)
    batch = batch_of(asked, texts)
    taught, learnt = (model(batch.tokens[None])[0] for model in (teacher, student))
    written, before = unbroken(batch)
    valid = {
        name: verdicts(batch, logits.argmax(-1))
        for name, logits in (("teacher", taught), ("student", learnt))
    }
    found = {
        "after": 1 - before.sum() / batch.counts.sum(),
        **{name: (each & before).sum() / before.sum() for name, each in valid.items()},
        "differ": ((valid["teacher"] != valid["student"]) & batch.counts).sum() / batch.counts.sum(),
    }
    labels = torch.where(written & batch.counts, batch.labels, -1)
    for name in ("forward_kl", "jsd"):
        stats = vcrd.vocab_parallel_divergence(learnt, taught, labels, divergence=name, mask=batch.counts)
        all_of_it = stats.divergence[batch.counts].sum()
        found[name] = stats.divergence[batch.counts & ~before].sum() / all_of_it
        found[f"{name}_wrong"] = stats.divergence[before & ~valid["teacher"]].sum() / all_of_it
        if name == "forward_kl":
            weights, _ = vcrd.validity_weights(stats, validity="label", mask=batch.counts)
            moved = ((weights - 1).abs() > 0.1) & (labels >= 0)
            found["label"] = moved.sum() / batch.counts.sum()
    return {name: float(share) for name, share in found.items()}


def measured(tasks: list[str], sizes: Sizes, out: Path) -> dict[str, dict[str, float]]:
    """Means over tasks and seeds, by regime. FileNotFoundError if a model has not been trained."""
    torch.set_num_threads(1)
    found = {}
    for regime in TITLES:
        each = [
            shares(
                trained(task, None, sizes, out),
                trained(task, seed, sizes, out),
                family_of(task),
                regime,
                seed,
                sizes.problems,
            )
            for task in tasks
            for seed in range(sizes.seeds)
        ]
        found[regime] = {name: float(np.mean([one[name] for one in each])) for name in ROWS}
    return found


def page(content: dict) -> str:
    columns = [(config, regime) for config, those in content.items() for regime in those]
    rows = [["of tokens, or of the divergence, %", *map(", ".join, columns)]]
    for name, title in ROWS.items():
        # On the student's own prefixes only the verifier provides labels.
        rows.append(
            [
                title,
                *(
                    "" if (name, regime) == ("label", OWN) else f"{100 * content[config][regime][name]:.1f}"
                    for config, regime in columns
                ),
            ]
        )
    return table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of run.py's results")
    parser.add_argument(
        "--configs",
        default="small",
        help="configurations whose models run.py has trained in OUT, separated by ','",
    )
    parser.add_argument("--tasks", default=TASKS)
    options = parser.parse_args(arguments)
    names, tasks = options.configs.split(","), options.tasks.split(",")
    try:
        if unknown := [name for name in names if name not in CONFIGS]:
            raise ValueError(f"--configs: expected names among {list(CONFIGS)}, got {unknown[0]!r}")
        content = {name: measured(tasks, CONFIGS[name], options.out) for name in names}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    (options.out / "anatomy.json").write_text(json.dumps(content, indent=0) + "\n")
    print(page(content))


if __name__ == "__main__":
    main()
