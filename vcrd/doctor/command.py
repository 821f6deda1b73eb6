"""The command `python -m vcrd doctor`: its options and its output.

Wrong options are reported without importing torch, as an OptionError of one sentence.
"""

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

from vcrd.doctor.checks import Options, import_crash
from vcrd.doctor.findings import Finding, first_line, problem, table
from vcrd.doctor.processes import Unreachable, World, world_of
from vcrd.errors import OptionError, expected
from vcrd.plan.command import add_run_options, parse_count, parse_number, scenario_of
from vcrd.plan.scenario import Scenario

_TIMEOUT = 300.0  # seconds for the whole command, in addition to what the options allow for its parts
_LAYOUT = ("tp", "pp", "cp", "dp", "ep", "replicas")
_ANY_MODEL = "params=1e12,hidden=4096,layers=1000,vocab=131072"

SUMMARY = "checks whether a run will work on this machine, or under srun or torchrun on all nodes"
DESCRIPTION = """\
Checks what a run needs: driver, GPUs, NVLink and clocks; torch, NCCL, Transformer Engine, megatron-core, apex; the
extension and the results of its kernels; settings, limits, ports, the shared folder. With several processes it also
checks that all of them have the same versions and settings, and measures the link. It prints one line for each check,
and under each problem its fix.

  python -m vcrd doctor --run-dir DIR                                   one node
  srun python -m vcrd doctor --run-dir DIR                              every node of a job, one table
  srun --ntasks=24 python -m vcrd doctor --run-dir DIR --teacher Qwen3-32B,tp=8 --student Qwen3-4B,tp=2,dp=8

Exit status: 0 without a problem, 1 with a problem, 2 for a wrong option. Without a GPU the checks of GPUs are reported
as not checked.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--run-dir",
        help="the folder that all nodes share: checkpoints, logs, the file of VCRD_ADDRESS; created if missing",
    )
    add("--port", action="append", default=[], help="must be free on every node; may be given several times")
    add(
        "--gpus",
        default="0",
        help="GPUs that every node must have at least (0; under Slurm those of the job)",
    )
    add("--timeout", default="60", help="seconds to wait for the other processes, and for one check (60)")
    add("--seconds", default="2", help="how long the link is measured (2)")
    add(
        "--during-run",
        action="store_true",
        help="a run is using this machine: memory and ports in use are no problem, CUDA kernels are not tested",
    )
    add("--json", action="store_true", help="print everything as JSON")
    link = parser.add_argument_group(
        "the link",
        "With both layouts, the link is measured between the ranks that will use it; start as many processes as both "
        "jobs have together. With both models, given as for `plan`, the result is also compared with what the run "
        "needs.",
    )
    add_run_options(link, required=False)


def options_of(arguments: argparse.Namespace) -> Options:
    """OptionError for a wrong option."""
    if (arguments.teacher is None) != (arguments.student is None):
        missing, given = ("teacher", "student") if arguments.teacher is None else ("student", "teacher")
        raise expected(f"--{missing}", f"a layout because --{given} is given", "none", OptionError)
    scenario, models_known = None, False
    if arguments.teacher is not None:
        scenario, models_known = _scenario(arguments)
    return Options(
        run_dir=arguments.run_dir,
        ports=tuple(_port(text) for text in arguments.port),
        gpus=int(
            parse_number(
                "--gpus", arguments.gpus, "an integer of at least 0", lambda v: v >= 0 and v == int(v)
            )
        ),
        scenario=scenario,
        models_known=models_known,
        timeout=parse_number("--timeout", arguments.timeout, "a positive number", lambda v: v > 0),
        seconds=parse_number(
            "--seconds", arguments.seconds, "a number from 0.1 to 60", lambda v: 0.1 <= v <= 60
        ),
        during_run=arguments.during_run,
    )


def _scenario(arguments: argparse.Namespace) -> tuple[Scenario, bool]:
    """The scenario of `plan`, which needs models. Bare layouts get the sizes of a model that fits any layout."""
    bare = {side: _is_layout(getattr(arguments, side)) for side in ("teacher", "student")}
    if bare["teacher"] != bare["student"]:
        missing, given = ("teacher", "student") if bare["teacher"] else ("student", "teacher")
        text = repr(getattr(arguments, missing))
        raise expected(f"--{missing}", f"a model because --{given} names one", text, OptionError)
    texts = {
        side: f"{_ANY_MODEL},{getattr(arguments, side)}" if bare[side] else getattr(arguments, side)
        for side in bare
    }
    full = argparse.Namespace(**{**vars(arguments), **texts, "network": "1", "transport": "tcp"})
    return scenario_of(full), not bare["teacher"]


def _is_layout(text: str) -> bool:
    return bool(text) and all(part.partition("=")[0].strip() in _LAYOUT for part in text.split(","))


def _port(text: str) -> int:
    port = parse_count("--port", text)
    if port > 65535:
        raise expected("--port", "a port from 1 to 65535", repr(text), OptionError)
    return port


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The text to print and the exit status. OptionError for a wrong option."""
    options, world = options_of(arguments), world_of(os.environ)
    # torch logs every attempt to reach a store that is not open yet.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if why := _torch_error(options.timeout):
        return _without_torch(world, why, arguments.json)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # Ends the process if a check holds the interpreter's lock, so that no timeout in Python can work.
    faulthandler.dump_traceback_later(_TIMEOUT + 8 * options.timeout + options.seconds, exit=True)
    try:
        # Imported here because it imports torch.
        from vcrd.doctor.examination import examine

        examined = examine(options, world)
    except Unreachable as error:
        print(f"python -m vcrd doctor: {error}", file=sys.stderr)
        return "", 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        logging.disable(before)
    if world.rank:
        return "", 0  # rank 0 prints the table, and its exit status is that of all ranks
    text = _output(world, examined.findings, examined.nodes, arguments.json)
    return text, int(any(finding.fix for finding in examined.findings))


def _torch_error(seconds: float) -> str:
    """Why torch cannot be imported; empty if it can."""
    if crash := import_crash("torch", seconds):
        return f"importing it {crash}"
    try:
        importlib.import_module("torch")
    except Exception as error:  # the run would get the same exception, whatever its type
        return f"cannot be imported: {first_line(error)}"
    return ""


def _without_torch(world: World, why: str, as_json: bool) -> tuple[str, int]:
    if world.rank:  # rank 0 reports that this rank did not come
        print(f"python -m vcrd doctor: torch on {world.node}: {why}", file=sys.stderr)
        return "", 1
    fix = "Reinstall torch in this environment (pytorch.org has the command), or use another container image."
    return _output(
        world, [problem("torch", f"{why}; nothing else was checked", fix)], [world.node], as_json
    ), 1


def _output(world: World, findings: Sequence[Finding], nodes: Sequence[str], as_json: bool) -> str:
    if as_json:
        values = {
            "processes": world.size,
            "nodes": list(nodes),
            "problems": sum(bool(finding.fix) for finding in findings),
            "findings": [finding.plain() for finding in findings],
        }
        return json.dumps(values, indent=1)
    title = f"vcrd doctor: {world.size} process{'' if world.size == 1 else 'es'} on {', '.join(nodes[:8])}"
    if len(nodes) > 8:
        title += f" and {len(nodes) - 8} other nodes"
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return table(findings, title, columns)
