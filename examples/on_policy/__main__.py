"""Off-policy and on-policy distillation of one student, compared in one Megatron job.

    torchrun --standalone --nproc-per-node 4 -m examples.on_policy --tensor 2 --pipeline 2 --out FOLDER

Trains a teacher on right solutions of generated problems, and for each seed a smaller student, but briefly. From there
the student is distilled once per method, and the held-out problems that it solves are counted. Writes results.json and
curves.svg. Without a GPU it runs on CPU and gloo. docs/on-policy.md explains it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
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

from examples.on_policy import train  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.on_policy", description=__doc__)
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=2, help="pipeline stages")
    parser.add_argument("--quick", action="store_true", help="a minute: too short to compare anything")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and curves.svg")
    options = parser.parse_args()
    sizes = train.QUICK if options.quick else train.FULL
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(options.tensor, options.pipeline)
    model_parallel_cuda_manual_seed(1)
    started = time.perf_counter()

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)

    teacher, about = train.train_teacher(sizes, say)
    runs: list[train.Run] = []
    for seed in range(1, sizes.seeds + 1):
        runs += train.compare(teacher, about, seed, sizes, say)
        if dist.get_rank() == 0:
            from examples.on_policy import plot

            results = {
                "layout": {"tensor": options.tensor, "pipeline": options.pipeline},
                "sizes": asdict(sizes),
                "teacher": asdict(about),
                "runs": [asdict(run) for run in runs],
                "seconds": time.perf_counter() - started,
            }
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            plot.draw(options.out / "curves.svg", results)
    say(f"wrote {options.out}/results.json and curves.svg")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
