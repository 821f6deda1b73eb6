"""The command `python -m vcrd report`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from vcrd.errors import OptionError

SUMMARY = "makes one page of a run: curves, weights, time, machines"
DESCRIPTION = """\
Reads the records that the ranks of student and teacher wrote (telemetry_dir; docs/metrics.md) and draws one
self-contained HTML page: curves, the histogram of the weights, the parts of a step, memory, utilisation and power of
the GPUs, the traffic of the link, and the warnings about waiting.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of the records")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="file of the page (default: RUN_DIR/report.html)"
    )


def run(options: argparse.Namespace) -> tuple[str, int]:
    """Writes the page. Returns the text to print and the exit status. OptionError if the page cannot be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("matplotlib: expected the package (pip install matplotlib), got none")
    # Imported here because they import matplotlib.
    from vcrd.report import page
    from vcrd.report.run import NoRecords, load

    try:
        found = load(options.run_dir)
    except NoRecords as error:
        raise OptionError(f"RUN_DIR: {error}") from None
    output = options.output or options.run_dir / "report.html"
    text = page.text_of(found)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--output: {output} cannot be written ({error.strerror})") from None
    return f"{output}: {len(text) / 1e6:.2g} MB", 0
