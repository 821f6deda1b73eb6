"""`python -m vcrd doctor`."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence

from vcrd.doctor import loading
from vcrd.doctor.findings import fault, first_line
from vcrd.doctor.options import Asked, asked_of
from vcrd.doctor.world import World, world_of

_MOST_PATIENCE = 300.0  # seconds, beside what --timeout allows each of the parts

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
    if why := _no_torch(asked.timeout):
        return _without_torch(asked, world, why)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # What holds the interpreter itself cannot be waited for with patience.
    faulthandler.dump_traceback_later(_MOST_PATIENCE + 8 * asked.timeout + asked.seconds, exit=True)
    try:
        # Here, for it imports torch, and a wrong option should not have to wait for that.
        from vcrd.doctor.examination import examine

        outcome = examine(asked, world)
    finally:
        faulthandler.cancel_dump_traceback_later()
        logging.disable(before)
    if outcome.excuse:
        print(f"python -m vcrd doctor: {outcome.excuse}", file=sys.stderr)
        return "", 1
    if world.rank:
        return "", 0  # rank 0 prints, and its status is that of all
    return _shown(asked, world, outcome.findings, outcome.nodes), int(any(f.fix for f in outcome.findings))


def _no_torch(seconds: float) -> str:
    """Why torch cannot be imported here; empty where it can."""
    if why := loading.cannot_bear("torch", seconds):
        return f"whoever imports it {why}"
    try:
        importlib.import_module("torch")
    except Exception as error:  # whatever it raises is what the run would see
        return f"cannot be imported: {first_line(error)}"
    return ""


def _without_torch(asked: Asked, world: World, why: str) -> tuple[str, int]:
    if world.rank:  # rank 0 will say that this one did not come
        print(f"python -m vcrd doctor: torch on {world.node}: {why}", file=sys.stderr)
        return "", 1
    fix = "Install torch anew in this environment (pytorch.org has the command), or use another container image."
    return _shown(asked, world, [fault("torch", f"{why}; nothing else was looked at", fix)], [world.node]), 1


def _shown(asked: Asked, world: World, findings: Sequence, nodes: Sequence[str]) -> str:
    if asked.json:
        values = {
            "processes": world.size,
            "nodes": list(nodes),
            "faults": sum(bool(f.fix) for f in findings),
        }
        return json.dumps({**values, "findings": [finding.plain() for finding in findings]}, indent=1)
    from vcrd.doctor.table import text_of

    title = f"vcrd doctor: {world.size} process{'' if world.size == 1 else 'es'} on {', '.join(nodes[:8])}"
    if len(nodes) > 8:
        title += f" and {len(nodes) - 8} other nodes"
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return text_of(findings, title, columns)
