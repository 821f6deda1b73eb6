"""Writes the tables of docs/evidence/*.json into docs/evidence.md and docs/evidence-tables.md, and draws the pictures.

    python research/page.py

A table is between `<!-- tables: NAME -->` and `<!-- end -->`. The tables "map", "summary" and "controls" use several
results, and "check" a part of one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import anatomy
import estimators
import plots
import privileged
import tables
from lm import page as lm
from runs import TASKS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("evidence.md", "evidence-tables.md")
_TABLES = re.compile(r"(<!-- tables: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def comparisons(folder: Path) -> dict[str, tables.Results]:
    """Results by the name of their file, larger files first."""
    paths = sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_size)
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    return {name: tables.Results(content) for name, content in found.items() if "runs" in content}


def tables_of(name: str, folder: Path) -> str:
    made_by = {"estimators": estimators, "anatomy": anatomy, "privileged": privileged, "lm": lm}.get(name)
    if made_by is not None:
        return made_by.page(json.loads((folder / f"{name}.json").read_text()))
    known = comparisons(folder)
    if name == "map":
        places: dict[str, list[tables.Results]] = {}
        for results in known.values():
            if not set(results.tasks) <= set(TASKS.split(",")):
                continue  # other families
            places.setdefault(results.content["config"], []).append(results)
        return tables.where(places)
    if name == "summary":
        return tables.summary(known)
    if name == "check":
        return tables.check(known["held-out"])
    if name == "controls":
        both = {"good teachers": "choice-controls", "worse teachers": "choice-worse-teacher"}
        return tables.against_controls({title: known[of] for title, of in both.items()})
    return tables.page(known[name]).replace("## ", "### ")


def with_tables(text: str, folder: Path) -> str:
    """The text of the page, with each table made again from folder/NAME.json."""

    def made(found: re.Match) -> str:
        return f"{found[1]}\n{tables_of(found[2], folder).strip()}\n\n{found[3]}"

    return _TABLES.sub(made, text)


def main() -> None:
    for name in PAGES:
        text = (DOCS / name).read_text()
        (DOCS / name).write_text(with_tables(text, DOCS / "evidence"))
    for name, results in comparisons(DOCS / "evidence").items():
        plots.draw(results, DOCS / "images" / "evidence" / name)
    if (found := DOCS / "evidence" / "lm.json").exists():
        lm.draw(json.loads(found.read_text()), DOCS / "images" / "evidence" / "lm")


if __name__ == "__main__":
    main()
