"""A finding is one line of the doctor's table. Merges the findings of many processes, and prints the table."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

OK, PROBLEM, UNCHECKED, INFO = "ok", "problem", "not checked", "info"
_COLOURS = {OK: "green", PROBLEM: "bold red", UNCHECKED: "yellow", INFO: "dim"}
_NO_WRAP = (
    100_000  # columns where there is no terminal: lines of a log are not wrapped, so that grep finds them
)
_MOST_NAMES = 4  # nodes and ranks that one line names


@dataclass(frozen=True)
class Finding:
    """name: of the line, the same in every run; docs/troubleshooting.md lists those that can be problems. status: one
    of the four above. found: what the check saw. fix: for a problem, one sentence that says what to do. where: the
    nodes or ranks that have this finding; empty if all have it. fix_if_different: the fix if processes differ in this
    finding; empty if they may differ.
    """

    name: str
    status: str
    found: str
    fix: str = ""
    where: str = ""
    fix_if_different: str = ""

    def plain(self) -> dict[str, Any]:
        """The values for JSON."""
        return asdict(self)


def ok(name: str, found: str, fix_if_different: str = "") -> Finding:
    return Finding(name, OK, found, fix_if_different=fix_if_different)


def problem(name: str, found: str, fix: str) -> Finding:
    return Finding(name, PROBLEM, found, fix)


def unchecked(name: str, why: str) -> Finding:
    return Finding(name, UNCHECKED, why)


def info(name: str, found: str, fix_if_different: str = "") -> Finding:
    """Something that is neither right nor wrong by itself."""
    return Finding(name, INFO, found, fix_if_different=fix_if_different)


def first_line(error: BaseException) -> str:
    """The first line of the exception's message, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# Merging: findings that are equal on all processes become one line, others name their nodes.


def merged(found: Mapping[int, Sequence[Finding]], nodes: Mapping[int, str]) -> list[Finding]:
    """found, nodes: by rank. Lines keep the order of the first rank that has them."""
    lines: list[Finding] = []
    for name in _names(found):
        groups: dict[Finding, list[int]] = {}
        for rank, findings in found.items():
            for finding in dict.fromkeys(findings):
                if finding.name == name:
                    groups.setdefault(finding, []).append(rank)
        lines += _merged_line(groups, nodes)
    return lines


def _names(found: Mapping[int, Sequence[Finding]]) -> list[str]:
    """All names in order. A name that a rank does not have goes after the name that precedes it on another rank."""
    names: list[str] = []
    for findings in found.values():
        at = 0
        for finding in findings:
            if finding.name not in names:
                names.insert(at, finding.name)
            at = names.index(finding.name) + 1
    return names


def _merged_line(groups: Mapping[Finding, list[int]], nodes: Mapping[int, str]) -> list[Finding]:
    """The lines of one name. groups: the ranks of each different finding."""
    places = _Places({rank for ranks in groups.values() for rank in ranks}, nodes)
    lines = [
        replace(finding, where=places.where(ranks))
        for finding, ranks in groups.items()
        if finding.status == PROBLEM
    ]
    others = {finding: ranks for finding, ranks in groups.items() if finding.status != PROBLEM}
    if len(others) > 1 and all(finding.fix_if_different for finding in others):
        return [*lines, _different(others, places)]
    for status in dict.fromkeys(finding.status for finding in others):
        first, *rest = [(finding, ranks) for finding, ranks in others.items() if finding.status == status]
        text = first[0].found
        if rest:
            text += f" (on {places.where(first[1])}; other values elsewhere)"
        ranks = sorted(rank for _, some in (first, *rest) for rank in some)
        lines.append(replace(first[0], found=text, where=places.where(ranks)))
    return lines


def _different(groups: Mapping[Finding, list[int]], places: _Places) -> Finding:
    """One problem. The finding of most ranks is assumed to be the intended one."""
    *odd, (usual, _) = sorted(groups.items(), key=lambda item: len(item[1]))
    parts = [f"{places.where(ranks)}: {finding.found}" for finding, ranks in odd]
    text = f"{'; '.join(parts)}; others: {usual.found}"
    return replace(usual, status=PROBLEM, found=text, fix=usual.fix_if_different)


class _Places:
    """Names the nodes and ranks of a line. ranks: those that have a finding of this name; some checks run once per
    node.
    """

    def __init__(self, ranks: set[int], nodes: Mapping[int, str]) -> None:
        self._nodes = nodes
        first_on_node = {min(rank for rank in nodes if nodes[rank] == node) for node in nodes.values()}
        self._checked = first_on_node if ranks <= first_on_node else set(nodes)

    def where(self, ranks: Sequence[int]) -> str:
        """Empty for all ranks. A node is named if all its ranks that were checked are meant, and ranks otherwise."""
        if set(ranks) == self._checked:
            return ""
        names, single = [], []
        for node in dict.fromkeys(self._nodes[rank] for rank in ranks):
            mine = [rank for rank in ranks if self._nodes[rank] == node]
            if {rank for rank in self._checked if self._nodes[rank] == node} == set(mine):
                names.append(node)
            else:
                single += [f"rank {rank} on {node}" for rank in mine]
        names += single
        more = f" and {len(names) - _MOST_NAMES} others" if len(names) > _MOST_NAMES else ""
        return ", ".join(names[:_MOST_NAMES]) + more


# The table: one line for each finding, and under each problem its fix.


def table(findings: Sequence[Finding], title: str, columns: int | None = None) -> str:
    """columns: width of the terminal, which gets colours and wrapped lines. None: a pipe or a file, which gets
    neither.
    """
    rows = [row for finding in findings for row in _rows(finding)]
    if importlib.util.find_spec("rich") is None:
        body = _plain(rows)
    else:
        body = _rich(rows, columns)
    return f"{title}\n{body}\n{summary(findings)}"


def summary(findings: Sequence[Finding]) -> str:
    count = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    problems = f"{count[PROBLEM]} problem" + ("" if count[PROBLEM] == 1 else "s")
    return f"{problems}, {count[OK]} ok, {count[UNCHECKED]} not checked"


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

    layout = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    layout.add_column(no_wrap=True)
    layout.add_column(no_wrap=True)
    layout.add_column(overflow="fold")
    for status, name, text in rows:
        colour = _COLOURS.get(status, "")
        layout.add_row(Text(status, colour), Text(name), Text(text, "" if status else "cyan"))
    terminal = columns is not None
    console = Console(
        file=io.StringIO(),
        width=columns if terminal else _NO_WRAP,
        force_terminal=terminal,
        no_color=None if terminal else True,  # None: rich follows NO_COLOR
        color_system="standard" if terminal else None,
        legacy_windows=False,
    )
    console.print(layout)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").splitlines())
