"""The options of `python -m vcrd doctor`. Fast: no torch. Every wrong input is an OptionError of one sentence."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vcrd.plan.options import OptionError, add_run_options, number, scenario_of, whole
from vcrd.plan.scenario import Scenario

_LAYOUT = ("tp", "pp", "cp", "dp", "ep", "replicas")
_ANY_MODEL = "params=1e12,hidden=4096,layers=1000,vocab=131072"


@dataclass(frozen=True)
class Asked:
    """What the command line says, checked. models_known: whether the scenario has the models' sizes too."""

    run_dir: str | None
    ports: tuple[int, ...]
    gpus: int
    scenario: Scenario | None
    models_known: bool
    timeout: float
    seconds: float
    json: bool
    during_run: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--run-dir",
        help="the folder that all nodes share: checkpoints, logs, the file of VCRD_ADDRESS; made if missing",
    )
    add("--port", action="append", default=[], help="must be free on every node; may be given several times")
    add(
        "--gpus",
        default="0",
        help="GPUs that every node must have at least (0; under Slurm what the job was given)",
    )
    add("--timeout", default="60", help="seconds to wait for the other processes, and for one check (60)")
    add("--seconds", default="2", help="seconds that the link is measured (2)")
    add(
        "--during-run",
        action="store_true",
        help="a run is under way: its GPU memory and ports are no faults, and the GPUs' kernels are not tested",
    )
    add("--json", action="store_true", help="everything as JSON instead")
    link = parser.add_argument_group(
        "the link",
        "With both layouts it is measured between the ranks that will talk, by as many processes as both jobs have "
        "together; with both models, as `plan` takes them, also compared with what the run needs.",
    )
    add_run_options(link, required=False)


def asked_of(options: argparse.Namespace) -> Asked:
    if (options.teacher is None) != (options.student is None):
        missing, given = ("teacher", "student") if options.teacher is None else ("student", "teacher")
        raise OptionError(f"--{missing}: must be given where --{given} is")
    scenario, models_known = None, False
    if options.teacher is not None:
        scenario, models_known = _scenario(options)
    return Asked(
        run_dir=options.run_dir,
        ports=tuple(_port(text) for text in options.port),
        gpus=int(
            number("--gpus", options.gpus, "an integer of at least 0", lambda v: v >= 0 and v == int(v))
        ),
        scenario=scenario,
        models_known=models_known,
        timeout=number("--timeout", options.timeout, "a positive number", lambda v: v > 0),
        seconds=number("--seconds", options.seconds, "a number from 0.1 to 60", lambda v: 0.1 <= v <= 60),
        json=options.json,
        during_run=options.during_run,
    )


def _scenario(options: argparse.Namespace) -> tuple[Scenario, bool]:
    """What it would be for `plan`, which needs models; where there are none, with sizes that stand for any."""
    bare = {side: _is_layout(getattr(options, side)) for side in ("teacher", "student")}
    if bare["teacher"] != bare["student"]:
        missing, given = ("teacher", "student") if bare["teacher"] else ("student", "teacher")
        raise OptionError(f"--{missing}: must name a model where --{given} does, or neither")
    texts = {
        side: f"{_ANY_MODEL},{getattr(options, side)}" if bare[side] else getattr(options, side)
        for side in bare
    }
    full = argparse.Namespace(**{**vars(options), **texts, "network": "1", "transport": "tcp"})
    return scenario_of(full), not bare["teacher"]


def _is_layout(text: str) -> bool:
    return bool(text) and all(part.partition("=")[0].strip() in _LAYOUT for part in text.split(","))


def _port(text: str) -> int:
    port = whole("--port", text)
    if port > 65535:
        raise OptionError(f"--port: expected a port from 1 to 65535, got {text!r}")
    return port
