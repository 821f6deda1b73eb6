"""What a check found: one line of the doctor's table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, FAULT, UNCHECKED, FACT = "ok", "fault", "not checked", "fact"


@dataclass(frozen=True)
class Finding:
    """name: of the line, the same in every run (docs/troubleshooting.md lists those that can be faults). status: one of
    the four above. found: what was seen. fix: of a fault, one sentence that says what to do. where: which nodes or
    ranks, where not all. alike: what to do where processes differ in this; empty where they may.
    """

    name: str
    status: str
    found: str
    fix: str = ""
    where: str = ""
    alike: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def ok(name: str, found: str, alike: str = "") -> Finding:
    return Finding(name, OK, found, alike=alike)


def fault(name: str, found: str, fix: str) -> Finding:
    return Finding(name, FAULT, found, fix)


def unchecked(name: str, why: str) -> Finding:
    return Finding(name, UNCHECKED, why)


def fact(name: str, found: str, alike: str = "") -> Finding:
    """What is neither right nor wrong by itself."""
    return Finding(name, FACT, found, alike=alike)


def first_line(error: BaseException) -> str:
    """Of what an exception says; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
