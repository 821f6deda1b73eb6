"""A student learns from its own checkpoint, which sees the solution of each problem; the student does not.

    torchrun --standalone --nproc-per-node 1 -m examples.self_distillation --out FOLDER

One model is trained briefly on generated problems, three in four after a solution of the problem. So it solves some
problems by itself, and more where it sees a solution. Then it is distilled from a frozen copy of itself. It samples a
response to each problem; at each prefix of it the copy, with a solution in its context, says what comes next. The copy
is the student of the beginning: it is renewed every 20 rounds, and a run has 20. `--blind` is the control: the copy
sees no solution.

Writes results.json (results-blind.json): the share of held-out problems that the student solves without a solution, and
with one. Without a GPU it runs on CPU and gloo. docs/context.md explains the field that carries the solution.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from vcrd.megatron import cpu

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    torch.set_num_threads(1)  # the ranks share the cores
    cpu.enable()  # before anything of Megatron is imported

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from examples.on_policy.model import VOCAB, Learner, forward_step, shape  # noqa: E402
from examples.on_policy.problems import LENGTH, draw, is_right, micro_batches, solution  # noqa: E402
from examples.on_policy.sampling import sample  # noqa: E402
from examples.on_policy.train import answered, generator_of  # noqa: E402
from examples.verified.arithmetic import END, Chain, decode, encode  # noqa: E402
from vcrd.megatron import DistillSettings, distill  # noqa: E402

CONTEXT = "vcrd_teacher_context"


@dataclass(frozen=True)
class Sizes:
    """model: layers, hidden size and heads. first_updates: of the first training, on `first_rows` right solutions with
    the learning rate `first_rate`, three in four after a solution. rounds: of the distillation, each of `fresh` updates
    on `rows` samples, with the learning rate `rate`. renewed: rounds after which the teacher becomes a new copy of the
    student. held_out: problems that are counted every `interval` rounds.
    """

    model: tuple[int, int, int] = (2, 48, 4)
    first_updates: int = 300
    first_rows: int = 64
    first_rate: float = 5e-3
    rounds: int = 20
    fresh: int = 5
    rows: int = 32
    rate: float = 3e-4
    renewed: int = 20
    held_out: int = 200
    interval: int = 5


FULL = Sizes()
QUICK = Sizes(first_updates=10, first_rows=8, rounds=2, fresh=2, rows=8, renewed=1, held_out=8, interval=1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.self_distillation", description=__doc__)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="the teacher sees no solution: the control")
    parser.add_argument("--quick", action="store_true", help="some seconds: too short to learn anything")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(options.tensor, options.pipeline)
    model_parallel_cuda_manual_seed(1)
    started = time.perf_counter()

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)

    start = first_training(sizes, options.seed).state_dict()
    say("trained on right solutions")
    found = self_distillation(start, sizes, options.seed, options.blind, say)
    if options.out is not None and dist.get_rank() == 0:
        results = {"blind": options.blind, "seed": options.seed, "sizes": asdict(sizes), **found}
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"results{'-blind' if options.blind else ''}.json"
        path.write_text(json.dumps({**results, "seconds": time.perf_counter() - started}, indent=1) + "\n")
    dist.destroy_process_group()


def first_training(sizes: Sizes, seed: int) -> torch.nn.Module:
    """A model that has seen right solutions of problems, and three times as many of problems after a solution."""
    learner = Learner(shape(*sizes.model), seed, sizes.first_rate, sizes.first_updates, 2 * LENGTH)
    few = sizes.first_rows // 4
    for number in range(sizes.first_updates):
        problems = draw(sizes.first_rows, generator_of(seed, number, first=True))
        solutions = [solution(problem) for problem in problems]
        plain = micro_batches(problems[:few], solutions[:few], few)
        hinted = micro_batches(problems[few:], solutions[few:], len(problems) - few, hints=solutions[few:])
        learner.update(forward_step, iter([*plain, *hinted]), 2)
    return learner.model


def self_distillation(
    start: dict, sizes: Sizes, seed: int, blind: bool, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Trains the student. Returns what it solves without a solution, and with one, before and during it; and the mean
    divergence from the teacher of the rounds before each of these counts, in nats per token, where this rank has it.
    """
    learner = Learner(shape(*sizes.model), seed, sizes.rate, sizes.rounds * sizes.fresh, 2 * LENGTH)
    teacher = Learner(shape(*sizes.model), seed, sizes.rate, 1, 2 * LENGTH).model
    learner.model.load_state_dict(start)
    teacher.requires_grad_(False)
    settings = DistillSettings(
        divergence="jsd",
        validity="uniform",  # the teacher knows the solution: nothing is to be calibrated
        vocab_size=VOCAB,
        sequence_length=LENGTH,
    ).replaced(teacher_context_length=LENGTH)
    plug = distill(forward_step, settings, teacher=teacher.module)
    solved: dict[str, list[float]] = {"alone": [], "with a solution": []}
    divergences: list[float] = []

    def count(number: int) -> None:
        for name, shares in solved.items():
            shares.append(share_solved(learner.model, sizes, hinted=name != "alone"))
        say(f"round {number}: " + ", ".join(f"{name} {shares[-1]:.1%}" for name, shares in solved.items()))

    count(0)
    for number in range(sizes.rounds):
        if number % sizes.renewed == 0:
            teacher.load_state_dict(learner.model.state_dict())
        generator = generator_of(seed, number)
        problems = draw(sizes.rows * sizes.fresh, generator)
        chance = int(torch.randint(2**62, (), generator=generator))
        pairs = list(answered(learner.model, problems, 1.0, chance))
        batches = micro_batches(problems, [response for _, response in pairs], sizes.rows)
        if not blind:
            for place, batch in enumerate(batches):
                here = problems[place * sizes.rows : (place + 1) * sizes.rows]
                batch[CONTEXT] = [torch.tensor(encode(solution(problem))) for problem in here]
        micro_batch = iter(batches)
        for _ in range(sizes.fresh):
            learner.update(plug, micro_batch, 1)
        if (number + 1) % sizes.interval == 0:
            divergences.append(plug.report.take().divergence)
            count(number + 1)
    plug.close()
    return {**solved, "divergence": divergences}


def share_solved(model: torch.nn.Module, sizes: Sizes, hinted: bool) -> float:
    """Share of the held-out problems that the model solves with its most probable tokens."""
    problems: Sequence[Chain] = draw(sizes.held_out, torch.Generator().manual_seed(0), held_out=True)
    hints = [solution(problem) if hinted else "" for problem in problems]
    prompts = [encode(hint + problem.prompt) for hint, problem in zip(hints, problems, strict=True)]
    length = 2 * LENGTH if hinted else LENGTH + 1
    found = sample(model, prompts, length, END, vocab_size=VOCAB, temperature=0.0)
    return sum(map(is_right, problems, map(decode, found))) / len(problems)


if __name__ == "__main__":
    main()
