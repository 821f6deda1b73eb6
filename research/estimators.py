"""Measures how well each estimator without a verifier distinguishes correct steps from the first wrong one.

    python research/estimators.py --out evidence

Text and verdicts come from CHAMP (Mao, Kim and Zhou, arXiv 2401.06961): solutions of language models, in which people
have marked the first wrong step, if there is one. The teacher is SmolLM2-135M-Instruct. The students have ten of its
layers: before any training, and after a training as in the demo, on other problems than those judged here. Steps before
the first wrong one are correct. Later steps were not judged and are left out.

The AUROC of a score is the chance that it is higher at a correct step than at a wrong one, with ties counted half. 0.5
carries no information. The interval comes from a bootstrap over problems. Needs the packages of `make demo`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

import vcrd

LONGEST = 640  # tokens of problem and solution; longer steps are left out
_DRAWS = 1000
ESTIMATORS = ("label", "margin", "confidence")


@dataclass(frozen=True)
class Step:
    """A step of a solution: its first and last token, and whether people found it correct."""

    first: int
    last: int
    correct: bool


@dataclass(frozen=True)
class Judged:
    """tokens: the problem and a solution, in the chat template. steps: those with a verdict."""

    problem: str
    tokens: list[int]
    steps: list[Step]


def pieces(text: str) -> Iterator[tuple[int, int]]:
    """The steps of a solution as spans of characters: its lines, and the sentences of each."""
    for line in re.finditer(r"[^\n]+", text):
        first = line.start()
        for end in [*re.finditer(r"(?<=[.!?])\s+(?=[A-Z(])", line[0]), None]:
            last = line.end() if end is None else line.start() + end.start()
            if text[first:last].strip():
                yield first, last
            if end is not None:
                first = line.start() + end.end()


def verdict(piece: tuple[int, int], wrong: tuple[int, int] | None) -> bool | None:
    """Whether a step is correct; None if it was not judged. wrong: span of the first wrong step, if any."""
    if wrong is None or piece[1] <= wrong[0]:
        return True
    return False if piece[0] < wrong[1] else None


def judged(tokenizer, entry: dict) -> Iterator[Judged]:
    """entry: of the data set's problems."""
    question = {"role": "user", "content": entry["_text"]}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    for solution in (entry["fws_annotations"] or {}).values():
        text, start = solution["text"], solution["start_idx"]
        wrong = None if start is None else (start, solution["end_idx"])
        encoded = tokenizer(prompt + text, return_offsets_mapping=True, add_special_tokens=False)
        begins = [first - len(prompt) for first, _ in encoded["offset_mapping"]]
        steps = []
        for piece in pieces(text):
            correct = verdict(piece, wrong)
            inside = [place for place, begin in enumerate(begins) if piece[0] <= begin < piece[1]]
            if correct is not None and inside and inside[-1] < LONGEST:
                steps.append(Step(inside[0], inside[-1], correct))
        if steps:
            yield Judged(entry["identifier"], encoded["input_ids"][:LONGEST], steps)


@torch.no_grad()
def scores(item: Judged, teacher: Callable[[Tensor], Tensor], student: Callable[[Tensor], Tensor]) -> dict:
    """Scores of each token except the first, float [s - 1], by name: validities of both models, and rho."""
    tokens = torch.tensor(item.tokens)
    stats = vcrd.vocab_parallel_divergence(student(tokens)[:-1], teacher(tokens)[:-1], tokens[1:])
    found = {
        "teacher: label": stats.teacher_label_logprob,
        "student: label": stats.student_label_logprob,
        "teacher: margin": stats.student_logprob_of_teacher_action + stats.teacher_logprob_of_teacher_action,
        "student: margin": stats.student_logprob_of_student_action + stats.teacher_logprob_of_student_action,
        "teacher: confidence": -stats.teacher_entropy,
        "student: confidence": -stats.student_entropy,
    }
    for name in ESTIMATORS:
        # Sharpness does not change the order.
        _, found[f"relative: {name}"] = vcrd.validity_weights(stats, validity=name, sharpness=1.0)
    return {name: values.double().numpy() for name, values in found.items()}


def table_of(
    items: Sequence[Judged], teacher, student, say: Callable[[int], None]
) -> dict[str, dict[str, np.ndarray]]:
    """Columns by name, once for steps and once for tokens, with "problem" and "correct"."""
    rows: dict[str, list[dict]] = {"steps": [], "tokens": []}
    for number, item in enumerate(items):
        found = scores(item, teacher, student)
        for step in item.steps:
            # The label at a position is the next token.
            inside = {name: values[step.first - 1 : step.last] for name, values in found.items()}
            known = {"problem": item.problem, "correct": step.correct}
            position = {"trivial: earlier": -step.first, "trivial: shorter": step.first - step.last}
            rows["steps"].append({**known, **position, **{name: v.mean() for name, v in inside.items()}})
            rows["tokens"] += [
                {
                    **known,
                    "trivial: earlier": -(step.first + place),
                    **{name: v[place] for name, v in inside.items()},
                }
                for place in range(step.last - step.first + 1)
            ]
        say(number + 1)
    return {
        level: {name: np.array([row[name] for row in those]) for name in those[0]}
        for level, those in rows.items()
    }


def auroc(score: np.ndarray, correct: np.ndarray) -> float:
    """From the Mann-Whitney U, with ties counted half."""
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each value, starting at 1
    good = int(correct.sum())
    bad = len(correct) - good
    return float((middle[inverse][correct].sum() - good * (good + 1) / 2) / (good * bad))


def interval(
    score: np.ndarray, correct: np.ndarray, problem: np.ndarray, draws: int, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the AUROC, over problems."""
    rng = np.random.default_rng(seed)
    places = [np.flatnonzero(problem == name) for name in np.unique(problem)]
    found = []
    while len(found) < draws:
        drawn = np.concatenate([places[place] for place in rng.integers(len(places), size=len(places))])
        if 0 < correct[drawn].sum() < len(drawn):
            found.append(auroc(score[drawn], correct[drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def summary(columns: dict[str, np.ndarray], draws: int) -> dict:
    correct = columns["correct"].astype(bool)
    scored = {
        name: [auroc(values, correct), *interval(values, correct, columns["problem"], draws)]
        for name, values in columns.items()
        if name not in ("problem", "correct")
    }
    return {"correct": int(correct.sum()), "wrong": int((~correct).sum()), "auroc": scored}


def training(
    model: torch.nn.Module, teacher: Callable[[Tensor], Tensor], names: set[str], steps: int
) -> None:
    """Trains as in the demo: defaults of vcrd on human-written solutions of these problems."""
    from examples.demo import data, source
    from examples.demo.settings import CACHE, DemoSettings

    demo = DemoSettings("")
    problems = [problem for problem in source.problems(CACHE) if problem.name in names]
    optimizer = torch.optim.Adam(model.parameters(), lr=demo.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 4) * (0.55 + 0.45 * np.cos(np.pi * step / steps))
    )
    batches = data.training_steps(
        problems, steps, demo.micro_batches, demo.micro_batch_size, demo.sequence_length, demo.seed
    )
    model.train()
    for step in batches:
        optimizer.zero_grad()
        count = sum(float(batch["loss_mask"].sum()) for batch in step)
        for batch in step:
            with torch.no_grad():
                taught = teacher(batch["tokens"])
            logits = model(batch["tokens"], use_cache=False).logits
            out = vcrd.validity_calibrated_kl(logits, taught, batch["labels"], mask=batch["loss_mask"])
            (out.loss.sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of the results")
    parser.add_argument(
        "--problems", type=int, help="number of problems with judged solutions; default: every second problem"
    )
    parser.add_argument(
        "--steps", type=int, default=28, help="steps of the student's training (28, as in the demo)"
    )
    options = parser.parse_args(arguments)
    import copy

    from examples.demo.settings import CACHE, KEPT_LAYERS
    from examples.demo.source import chat_tokenizer, entries, hugging_face_model, prepare

    prepare(CACHE)
    known = entries()
    held = known[1::2][: options.problems]
    tokenizer = chat_tokenizer()
    items = [item for entry in held for item in judged(tokenizer, entry)]
    model = hugging_face_model().requires_grad_(False)
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList([smaller.model.layers[index] for index in KEPT_LAYERS])

    def of(network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def logits(tokens: Tensor) -> Tensor:
            found = network(tokens.view(-1, tokens.shape[-1]), use_cache=False).logits
            return found[0] if tokens.dim() == 1 else found

        return logits

    results = {"solutions": len(items), "problems": len(held), "steps": options.steps, "students": {}}
    for name in ("before training", "after training"):
        if name == "after training":
            training(
                smaller.requires_grad_(True),
                of(model),
                {entry["identifier"] for entry in known[::2]},
                options.steps,
            )
            smaller.requires_grad_(False)
        say = lambda done, name=name: print(f"\r{name}: {done} of {len(items)} solutions", end="", flush=True)  # noqa: E731
        tables = table_of(items, of(model), of(smaller), say)
        print()
        results["students"][name] = {level: summary(columns, _DRAWS) for level, columns in tables.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "estimators.json").write_text(json.dumps(results, indent=0) + "\n")
    print(page(results))


def page(results: dict) -> str:
    """The results as tables."""
    parts = [f"{results['solutions']} solutions of {results['problems']} problems.\n"]
    for student, levels in results["students"].items():
        first = levels["steps"]
        parts.append(f"Student {student}: {first['correct']} correct and {first['wrong']} wrong steps.\n")
        parts.append("| score | steps | tokens |\n| --- | --- | --- |")
        for name in first["auroc"]:
            cells = [levels[level]["auroc"].get(name) for level in ("steps", "tokens")]
            shown = [f"{cell[0]:.3f} ({cell[1]:.3f} to {cell[2]:.3f})" if cell else "" for cell in cells]
            parts.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
