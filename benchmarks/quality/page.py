"""Puts the tables of docs/evidence/*.json into docs/evidence.md, and the pictures beside it.

    python benchmarks/quality/page.py

A table stands between `<!-- tables: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import estimators
import plots
import tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
_TABLES = re.compile(r"(<!-- tables: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables_of(name: str, content: dict) -> str:
    if name == "estimators":
        return estimators.page(content)
    return tables.page(tables.Results(content)).replace("## ", "### ")


def with_tables(text: str, folder: Path) -> str:
    """The page's text, each table made anew from folder/NAME.json."""

    def made(found: re.Match) -> str:
        content = json.loads((folder / f"{found[2]}.json").read_text())
        return f"{found[1]}\n{tables_of(found[2], content).strip()}\n\n{found[3]}"

    return _TABLES.sub(made, text)


def main() -> None:
    page = DOCS / "evidence.md"
    page.write_text(with_tables(page.read_text(), DOCS / "evidence"))
    for path in sorted((DOCS / "evidence").glob("*.json")):
        content = json.loads(path.read_text())
        if "runs" in content:
            plots.draw(tables.Results(content), DOCS / "images" / "evidence" / path.stem)


if __name__ == "__main__":
    main()
