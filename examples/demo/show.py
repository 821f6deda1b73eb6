"""The output at the terminal: progress during the run, and a table at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .settings import DemoSettings

_ROWS = (
    ("KL divergence, teacher to student, nats per token", "divergence", "{:.3f}"),
    ("cross-entropy of the written solution, nats per token", "cross_entropy", "{:.3f}"),
    ("tokens where both models prefer the same token", "agreement", "{:.1%}"),
    ("mean weight of a token", "weight", "{:.3f}"),
    ("tokens where the student is more valid", "student_more_valid", "{:.1%}"),
)


class Follower:
    """Reads the student's events as they come, draws them, and keeps them for the results."""

    def __init__(self, console: Console, settings: DemoSettings) -> None:
        self.history: list[dict[str, Any]] = []
        self.measured: dict[str, dict[str, Any]] = {}
        self._console = console
        self._settings = settings
        self._path = settings.folder / "logs" / "events.jsonl"
        self._read = 0
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>3}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "starting", total=settings.steps, numbers="both jobs load their models"
        )

    @contextmanager
    def drawing(self) -> Iterator[Follower]:
        with self._progress:
            yield self

    def watch(self) -> None:
        """Reads the new events of the student."""
        if not self._path.exists():
            return
        with open(self._path) as file:
            file.seek(self._read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # incomplete
                self._read += len(line.encode())
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "measuring":
            self._progress.update(
                self._task, description="measuring", numbers=f"held-out problems, {event['stage']}"
            )
            self._say(f"measuring on held-out problems, {event['stage']} training")
        elif event["event"] == "measured":
            self.measured[event["stage"]] = event["figures"]
        else:
            self.history.append({key: event[key] for key in ("number", "seconds", "fed", "figures")})
            numbers = _numbers(self.history)
            self._progress.update(self._task, advance=1, description="distilling", numbers=numbers)
            if event["number"] % 5 == 0:
                self._say(f"step {event['number'] + 1}/{self._settings.steps}  {numbers}")

    def _say(self, line: str) -> None:
        # Without a terminal, prints a line from time to time.
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _numbers(history: list[dict[str, Any]]) -> str:
    """The latest step in one line, with rates over the last few steps."""
    latest, recent = history[-1]["figures"], history[-5:]
    seconds = sum(step["seconds"] for step in recent)
    rate = sum(step["fed"] for step in recent) / seconds
    wait = sum(step["figures"]["teacher_wait"] for step in recent) / seconds
    return (
        f"loss {latest['loss']:.3f}  KL {latest['divergence']:.3f}  weight {latest['weight']:.2f}  "
        f"student more valid {latest['student_more_valid']:.0%}  {rate:.0f} tok/s  wait {wait:.0%}"
    )


def table(measured: dict[str, dict[str, Any]]) -> Table:
    """The table of held-out results before and after training."""
    title = f"Held-out problems, {measured['after']['tokens']} tokens of written solutions"
    found = Table(title=title, title_justify="left")
    found.add_column("")
    found.add_column("before", justify="right")
    found.add_column("after", justify="right", style="bold")
    for row in figure_rows(measured):
        found.add_row(*row)
    return found


def figure_rows(measured: dict[str, dict[str, Any]]) -> list[list[str]]:
    """[name, before, after] as text."""
    return [
        [label, *(form.format(measured[stage][name]) for stage in ("before", "after"))]
        for label, name, form in _ROWS
    ]


def where(console: Console, folder: Path, files: dict[str, str]) -> None:
    """Prints where the results are."""
    console.print(f"\nResults are in [bold]{folder}[/]")
    for name, what in files.items():
        console.print(f"  {name:<16} {what}", highlight=False)
