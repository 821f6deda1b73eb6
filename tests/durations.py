"""Prints the time of the last `make test` or `make test-all`: a table by folder, with the slowest tests of each.

    python tests/durations.py build/tests-cp311.xml

Seconds include set-up, call and tear-down. They are summed over the workers, so the sum is larger than the run time.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

WORST = 3
WORTH_NAMING = 2.0  # seconds


def table(suite: ElementTree.Element) -> str:
    """A Markdown table: a row for each folder, the slowest first, and a total."""
    folders: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for case in suite.iter("testcase"):
        parts = case.get("classname", "").split(".")[1:]
        name = f"{parts[-1]}::{case.get('name')}" if parts else case.get("name", "")
        folders[parts[0] if len(parts) > 1 else "."].append((float(case.get("time", 0)), name))
    rows = ["| folder | tests | seconds | slowest |", "|---|---|---|---|"]
    for folder, cases in sorted(folders.items(), key=lambda item: -sum(seconds for seconds, _ in item[1])):
        worst = [case for case in sorted(cases, reverse=True)[:WORST] if case[0] >= WORTH_NAMING]
        names = ", ".join(f"`{name}` {seconds:.0f}" for seconds, name in worst)
        rows.append(f"| {folder} | {len(cases)} | {sum(seconds for seconds, _ in cases):.0f} | {names} |")
    everything = [case for cases in folders.values() for case in cases]
    total = sum(seconds for seconds, _ in everything)
    wall = float(suite.get("time", 0))
    rows.append(f"| all | {len(everything)} | {total:.0f} | the run took {wall:.0f} |")
    return "\n".join(rows)


def main(path: Path) -> int:
    if not path.exists():
        print(f"durations: {path} is missing; run `make test` first", file=sys.stderr)
        return 1
    print(table(ElementTree.parse(path).getroot().find("testsuite")))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
