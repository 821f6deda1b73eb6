"""docs/troubleshooting.md lists the lines that can be red."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of what makes a line, by its function."""
    for path in (ROOT / "vcrd" / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("ok", "info", "problem"):
                yield node.func.id, node


def rows(section: str) -> list[str]:
    """The first cells of its table."""
    table = PAGE.split(f"\n## {section}\n")[1].split("\n|---|---|\n")[1].split("\n\n")[0]
    return [row.split("|")[1] for row in table.splitlines()]


def test_the_table_has_every_line_that_can_be_red_and_no_other():
    made = [call for kind, call in calls() if kind == "problem"]
    for call in made:
        name, _, fix = call.args
        assert isinstance(name, ast.Constant), ast.dump(name)
        assert not (isinstance(fix, ast.Constant) and not fix.value.endswith((".", "`."))), fix.value
    documented = [name for row in rows("Problems") for name in re.findall("`(.+?)`", row)]
    assert documented == sorted({call.args[0].value for call in made})


def test_the_lines_that_must_be_equal_are_named():
    equal = {
        call.args[0].value
        for kind, call in calls()
        if kind != "problem"
        and (len(call.args) > 2 or any(each.arg == "fix_if_different" for each in call.keywords))
    }
    (paragraph,) = re.findall(r"\n\n([^\n]+\n[^\n]+) are problems too if processes differ", PAGE)
    assert re.findall("`(.+?)`", paragraph) == sorted(equal)


def test_variables_and_options_exist():
    from vcrd.settings import NAMES, variable_of

    assert set(re.findall(r"VCRD_[A-Z_]*[A-Z]", PAGE)) <= set(map(variable_of, NAMES))
    options = (ROOT / "vcrd" / "doctor" / "command.py").read_text() + (
        ROOT / "vcrd" / "plan" / "command.py"
    ).read_text()
    ours = [line for line in PAGE.splitlines() if "vcrd doctor" in line]
    for option in {option for line in ours for option in re.findall(r" (--[a-z-]+)", line)} - {
        "--ntasks",
        "--het-group",
    }:
        assert f'"{option}"' in options, option
