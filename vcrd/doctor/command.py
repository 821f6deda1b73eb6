"""`python -m vcrd doctor`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence

from vcrd.doctor.options import Asked, asked_of
from vcrd.doctor.world import World, world_of

SUMMARY = "whether a run will work on this machine, or under srun or torchrun on all of its nodes"
DESCRIPTION = """\
Looks at what a run needs: driver, GPUs, links and clocks; torch, NCCL, Transformer Engine, megatron-core, apex; the
extension and what its kernels compute; settings, limits, ports, the shared folder; between several processes also
whether all is the same everywhere, and how fast the link is. One line for each; under a red one, what to do.

  python -m vcrd doctor --run-dir DIR                                   one node
  srun python -m vcrd doctor --run-dir DIR                              every node of a job, one table
  srun --ntasks=24 python -m vcrd doctor --run-dir DIR --teacher Qwen3-32B,tp=8 --student Qwen3-4B,tp=2,dp=8

Exit status: 0 without a fault, 1 with one, 2 for a wrong option. Without a GPU it says what it could not check.
"""


def run(options: argparse.Namespace) -> tuple[str, int]:
    """What is to be printed, and the exit status; OptionError of one sentence for a wrong option."""
    asked, world = asked_of(options), world_of(os.environ)
    # torch writes of every attempt to reach a store that is not there yet, and of the last one too.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Here, for it imports torch, and a wrong option should not have to wait for that.
        from vcrd.doctor.examination import examine

        outcome = examine(asked, world)
    finally:
        logging.disable(before)
    if outcome.excuse:
        print(f"python -m vcrd doctor: {outcome.excuse}", file=sys.stderr)
        return "", 1
    if world.rank:
        return "", 0  # rank 0 prints, and its status is that of all
    return _shown(asked, world, outcome.findings, outcome.nodes), int(any(f.mend for f in outcome.findings))


def _shown(asked: Asked, world: World, findings: Sequence, nodes: Sequence[str]) -> str:
    if asked.json:
        values = {
            "processes": world.size,
            "nodes": list(nodes),
            "faults": sum(bool(f.mend) for f in findings),
        }
        return json.dumps({**values, "findings": [finding.plain() for finding in findings]}, indent=1)
    from vcrd.doctor.table import text_of

    title = f"vcrd doctor: {world.size} process{'' if world.size == 1 else 'es'} on {', '.join(nodes[:8])}"
    if len(nodes) > 8:
        title += f" and {len(nodes) - 8} other nodes"
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return text_of(findings, title, columns)
