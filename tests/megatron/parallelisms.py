"""Every layout that a CPU can run, 20 steps each, beside one process: python tests/megatron/parallelisms.py [NAME]"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from pretrain_jobs import Run, curve  # noqa: E402

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
    "accumulation": Run(1, "--micro-batch-size 1"),
    "pp2": Run(2, f"{PIPELINE} 2"),
}


def main(names: list[str], steps: int = 20) -> int:
    """Prints the largest relative difference of each layout's curve; 1 when one is past 1e-5."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        expected: dict[tuple[bool, str], list[float]] = {}
        for name in names or LAYOUTS:
            run = LAYOUTS[name]
            base = (run.experts, run.shared)
            if base not in expected:
                one = Run(experts=run.experts, shared=run.shared)
                expected[base] = curve(Path(folder), one, steps, seconds=400)
            found = curve(Path(folder), run, steps, seconds=400)
            pairs = zip(found, expected[base], strict=True)
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            bad += worst > 1e-5
            print(
                f"{name}: {expected[base][0]:.5f} to {expected[base][-1]:.5f}, differs by {worst:.1e}",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
