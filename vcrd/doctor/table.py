"""The table: one line for each check, green or red, and the fix under each red one."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence

from vcrd.doctor.findings import FACT, FAULT, OK, UNCHECKED, Finding

_COLOURS = {OK: "green", FAULT: "bold red", UNCHECKED: "yellow", FACT: "dim"}
_UNBROKEN = 100_000  # columns of what is not a screen: a line of a log is not broken, so that grep finds it


def text_of(findings: Sequence[Finding], title: str, columns: int | None = None) -> str:
    """columns: of the terminal that it is for, which gets colours; None for a pipe or a file, which gets neither."""
    rows = [row for finding in findings for row in _rows(finding)]
    if importlib.util.find_spec("rich") is None:
        body = _plain(rows)
    else:
        body = _rich(rows, columns)
    return f"{title}\n{body}\n{summary(findings)}"


def summary(findings: Sequence[Finding]) -> str:
    count = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    faults = f"{count[FAULT]} fault" + ("" if count[FAULT] == 1 else "s")
    return f"{faults}, {count[OK]} ok, {count[UNCHECKED]} not checked"


def _rows(finding: Finding) -> list[tuple[str, str, str]]:
    """Status, name, text."""
    place = f"{finding.where}: " if finding.where else ""
    rows = [(finding.status, finding.name, place + finding.found)]
    return [*rows, ("", "", f"fix: {finding.fix}")] if finding.fix else rows


def _plain(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _rich(rows: Sequence[tuple[str, str, str]], columns: int | None) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for status, name, text in rows:
        colour = _COLOURS.get(status, "")
        table.add_row(Text(status, colour), Text(name), Text(text, "" if status else "cyan"))
    screen = columns is not None
    console = Console(
        file=io.StringIO(),
        width=columns if screen else _UNBROKEN,
        force_terminal=screen,
        no_color=None if screen else True,  # None: as NO_COLOR says
        color_system="standard" if screen else None,
        legacy_windows=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").splitlines())
