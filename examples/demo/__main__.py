"""`python -m examples.demo`: prepares, runs both jobs, and shows the results or one error message."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from examples import demo
from vcrd.report import page as run_report
from vcrd.report.run import TOKENS, load

from . import launch, page, plots, show
from .settings import CACHE, KEPT_LAYERS, DemoSettings

_FILES = {
    "page.html": "held-out solutions, every token coloured by relative validity",
    "curves.png": "curves of the run and the histogram of weights",
    "report.html": "the report of the run: curves, weights, time of each part of a step",
    "results.json": "all figures",
    "records/": "the records for python -m vcrd report",
    "logs/": "what both jobs said",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo and returns the exit code."""
    console = Console(highlight=False)
    try:
        with launch.signals_raised():
            settings = _settings(arguments)
            run(console, settings)
        return 0
    except (launch.DemoFailed, ValueError) as error:
        console.print(f"demo: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    except launch.Interrupted as error:
        console.print(f"demo: stopped by {error}; both jobs were ended", style="bold red", markup=False)
        return 128 + error.number


def run(console: Console, settings: DemoSettings) -> None:
    """The whole demo. Raises DemoFailed."""
    begun = time.perf_counter()
    launch.check_port(settings.port)
    folder = _fresh_folder(settings)
    settings_file = folder / "logs" / "settings.json"
    settings.save(settings_file)
    console.print(
        "[bold]vcrd demo[/]  SmolLM2-135M-Instruct is the teacher of a student with "
        f"{len(KEPT_LAYERS)} of its 30 layers, on mathematical problems with step-by-step solutions\n"
        f"  {_where(settings)}",
        soft_wrap=True,
    )
    with console.status("reading model and text (the first run also converts them)"):
        launch.run_prepare(settings)
    follower = show.Follower(console, settings)
    with follower.drawing():
        launch.run_jobs(settings, settings_file, follower.watch)
    seconds = time.perf_counter() - begun
    results = {
        "settings": asdict(settings),
        "seconds": seconds,
        "student_layers": KEPT_LAYERS,
        "method": json.loads((folder / "logs" / "method.json").read_text()),
        "held_out": follower.measured,
        "training": follower.history,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    solutions = json.loads((folder / "logs" / "held_out.json").read_text())
    plots.draw(folder / "curves.png", results, solutions)
    page.write(folder / "page.html", results, solutions, Path(settings.cache))
    page.write_tokens(folder / "records" / TOKENS, results, solutions, Path(settings.cache))
    (folder / "report.html").write_text(run_report.text_of(load(folder / "records"), "demo"))
    console.print()
    console.print(show.table(follower.measured))
    show.where(console, folder, _FILES)
    console.print(f"It took {seconds / 60:.1f} minutes.")


def _where(settings: DemoSettings) -> str:
    if settings.gpu:
        return "teacher job and student job  one process each   Megatron-Core in bfloat16 on one GPU"
    return (
        f"teacher job  {settings.teacher_stages} pipeline stages   "
        f"student job  {settings.student_tensor_size} tensor ranks   Megatron-Core on CPU and gloo"
    )


def _settings(arguments: list[str] | None) -> DemoSettings:
    default = DemoSettings(output="demo-results")
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=demo.__doc__)
    parser.add_argument(
        "--steps",
        type=int,
        help=f"optimizer steps (default: {default.steps}, on a GPU {default.on_one_gpu().steps})",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=default.port,
        help="port of the link between the jobs (default: %(default)s)",
    )
    parser.add_argument(
        "--output", default=default.output, help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", default=str(CACHE), help="folder for the converted model (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="both jobs on the first GPU in bfloat16, over NCCL if it can be used",
    )
    parser.add_argument(
        "--fast", action="store_true", help="a few short sequences, to check that everything works"
    )
    given = parser.parse_args(arguments)
    if given.gpu:
        _require_a_gpu()
        default = default.on_one_gpu()
    settings = replace(
        default,
        steps=default.steps if given.steps is None else given.steps,
        port=given.port,
        output=str(Path(given.output).absolute()),
        cache=str(Path(given.cache).absolute()),
    )
    if settings.steps < 1:
        raise ValueError(f"--steps: expected at least 1, got {given.steps}")
    if not 0 < given.port < 65536:
        raise ValueError(f"--port: expected 1 to 65535, got {given.port}")
    return replace(settings, sequence_length=96, held_out=2, micro_batches=1) if given.fast else settings


def _require_a_gpu() -> None:
    """ValueError that says why there is none."""
    import torch

    if torch.version.cuda is None:
        raise ValueError(f"--gpu: expected a torch with CUDA, got {torch.__version__}")
    if not torch.cuda.is_available():
        raise ValueError("--gpu: expected a GPU, got none that torch can use")


def _fresh_folder(settings: DemoSettings) -> Path:
    """The output folder, without the files of an earlier run. git ignores its content."""
    folder = settings.folder
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("page.html", "curves.png", "report.html", "results.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "logs")
        shutil.rmtree(folder / "records", ignore_errors=True)
        (folder / "logs").mkdir()
        (folder / ".gitignore").write_text("*\n")
    except OSError as error:
        raise launch.DemoFailed(f"--output {folder} cannot be written: {error.strerror}") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
