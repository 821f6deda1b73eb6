"""Every layout that a CPU can run, 20 steps each, beside one process: losses, and the figures in the log.

    python tests/megatron/parallelisms.py [NAME ...]
    python tests/megatron/parallelisms.py --random 6 --seed 1

What is drawn: both jobs' parallelism, payload, micro-batches, and what else changes no loss.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from pretrain_jobs import Failed, Run, curve  # noqa: E402

TENSOR, PIPELINE = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
PER_TOKEN = "--calculate-per-token-loss"
# Compared with one process that has the same experts and shared arguments.
LAYOUTS = {
    "tp2": Run(2, f"{TENSOR} 2"),
    "tp2-pp2": Run(4, f"{TENSOR} 2 {PIPELINE} 2", 2, f"{PIPELINE} 2"),
    "pp4": Run(4, f"{PIPELINE} 4", 2, f"{TENSOR} 2"),
    "interleaved": Run(2, f"{PIPELINE} 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": Run(2, "", 2, f"{PIPELINE} 2"),
    "dp2-distributed-optimizer": Run(2, "--use-distributed-optimizer", 2, f"{TENSOR} 2"),
    "experts": Run(2, "--expert-model-parallel-size 2", experts=True),
    "per-token": Run(2, "", shared=PER_TOKEN),
    "accumulation": Run(1, "--micro-batch-size 1", 2, f"{PIPELINE} 2"),
    "pp2": Run(2, f"{PIPELINE} 2"),
    "same-ranks": Run(2, f"{PIPELINE} 2 --num-layers-per-virtual-pipeline-stage 1", 0),
    "same-ranks-experts": Run(2, "--expert-model-parallel-size 2", 0, experts=True),
}
PAYLOADS = ("float32", "float16", "logits_8bit", "topk", "hidden")
# The log has six digits; a quantile is the middle of a bin 4.4 % wide, and a token may stand at its edge.
LOSSES, FIGURES, QUANTILES = 1e-5, 2e-5, 0.05
UNLIKE = ("teacher wait", "link bytes", "verifier time")


def draw(generator: random.Random) -> tuple[Run, str]:
    """A layout of at most four student processes and four of the teacher's, and the payload."""
    experts = generator.random() < 0.25
    # Megatron trains experts with tensor parallelism only where it has sequence parallelism, which needs a GPU.
    tensor = 1 if experts else generator.choice((1, 2))
    pipeline, data = generator.choice([(p, d) for p in (1, 2, 4) for d in (1, 2) if tensor * p * d in (2, 4)])
    student = [f"{TENSOR} {tensor} {PIPELINE} {pipeline}"]
    if experts and data == 2:
        student += [f"--expert-model-parallel-size {generator.choice((1, 2))}"]
    if data == 2 and generator.random() < 0.5:
        student += ["--use-distributed-optimizer"]
    size = generator.choice((1, 2, 4))
    enough = 8 // (size * data) % pipeline == 0  # micro-batches for the stages
    if pipeline == 2 and enough and generator.random() < 0.6:
        student += ["--num-layers-per-virtual-pipeline-stage 1"]
    if generator.random() < 0.3:
        student += ["--vcrd-fused-head"]
    student += [f"--micro-batch-size {size} --vcrd-credits {generator.choice((0, 1, 2))}"]
    of_teacher = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)] + [(1, 1, 2), (1, 2, 2)] * (data == 2)
    its_tensor, its_pipeline, replicas = generator.choice(of_teacher)
    local = generator.random() < 0.2
    run = Run(
        tensor * pipeline * data,
        " ".join(student),
        0 if local else its_tensor * its_pipeline * replicas,
        f"{TENSOR} {its_tensor} {PIPELINE} {its_pipeline} --global-batch-size {replicas}",
        experts,
        generator.choice(("", PER_TOKEN)),
    )
    # A local teacher's logits are not encoded, so that only these equal those over the link to the last digits.
    return run, generator.choice(("float32", "hidden") if local else PAYLOADS)


def figures(folder: Path) -> list[dict[str, float]]:
    """Each step's, from the newest log of a student."""
    log = max(folder.glob("*/student.log"), key=lambda path: path.stat().st_mtime)
    found = []
    for line in log.read_text().splitlines():
        if line.startswith(" [vcrd] iteration"):
            parts = [part.split(": ") for part in line.split("|")[1:-1]]
            found.append({name.strip(): float(value) for name, value in parts if name.strip() not in UNLIKE})
    return found


class Comparison:
    """Runs beside one process of the same model, loss and payload, which runs once for each."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._steps = folder, steps
        self._expected: dict[tuple[bool, str, str], tuple[list[float], list[dict[str, float]]]] = {}

    def _run(self, run: Run, payload: str) -> tuple[list[float], list[dict[str, float]]]:
        # The last of two equal arguments counts.
        losses = curve(self._folder, run, self._steps, seconds=570, more=f"--vcrd-payload {payload}")
        return losses, figures(self._folder)

    def differs(self, name: str, run: Run, payload: str = "float32") -> bool:
        """Prints the largest relative differences; whether one is past its bar, or the run failed."""
        started = time.monotonic()
        base = (run.experts, run.shared, payload)
        try:
            if base not in self._expected:
                self._expected[base] = self._run(Run(experts=run.experts, shared=run.shared), payload)
            losses, logged = self._run(run, payload)
        except Failed as failure:
            print(f"{name}: failed\n{failure}", flush=True)
            return True
        expected, its = self._expected[base]
        loss = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        others = {False: 0.0, True: 0.0}  # by whether it is a quantile
        for ours, theirs in zip(logged, its, strict=True):
            for key in theirs.keys() | ours.keys():
                quantile = key.startswith("weight p")
                difference = abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-6)
                others[quantile] = max(others[quantile], difference)
        print(
            f"{name}: {expected[0]:.5f} to {expected[-1]:.5f}, differs by {loss:.1e}, figures in the log by "
            f"{others[False]:.1e}, quantiles by {others[True]:.1e} ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
        return loss > LOSSES or others[False] > FIGURES or others[True] > QUANTILES or not its


def main() -> int:
    """1 when a layout failed or differs by more than its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*LAYOUTS, []], metavar="NAME", help=", ".join(LAYOUTS))
    parser.add_argument("--random", type=int, default=0, help="draw so many layouts instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(Path(folder), options.steps)
        if options.random:
            runs = []
            for number in range(options.random):
                run, payload = draw(generator)
                teacher = run.teacher if run.teacher_processes else "in the same ranks"
                text = f"student {run.student} | teacher {teacher} | {run.shared} experts {run.experts}"
                runs.append((f"draw {number}: {text} | {payload}\n ", run, payload))
        else:
            runs = [(name, LAYOUTS[name], "float32") for name in options.names or LAYOUTS]
        return int(any([comparison.differs(*each) for each in runs]))


if __name__ == "__main__":
    sys.exit(main())
