"""The figures of the README are those of the files that measured them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COLUMNS = ("vcrd", "vcrd in place", "compiled KL", "Megatron CE", "Liger KL", "ModelOpt")


def row(title: str) -> list[str]:
    """The cells of the row with this title, without bold."""
    (cells,) = re.findall(rf"^\| {re.escape(title)} \| (.*) \|$", README, re.MULTILINE)
    return [cell.strip("* ") for cell in cells.replace("**", "").split("|")]


def test_the_times_and_the_memory_of_the_gpu():
    measured = json.loads((ROOT / "docs/performance/loss-h100.json").read_text())
    (case,) = (each for each in measured["cases"] if each["case"]["columns"] == 131072)
    assert (case["case"]["tokens"], case["case"]["dtype"]) == (4096, "bfloat16")
    times = row("one H100, [4096, 131072] bfloat16")
    share = round(100 * case["derived"]["vcrd"]["forward_backward_share_of_copy"])
    assert times[0].endswith(f"{share} % of a copy's bandwidth")
    for name, time, memory in zip(COLUMNS, times, row("extra memory beyond the logits, GiB"), strict=True):
        derived = case["derived"][name]
        shown = float(re.match(r"([0-9.]+) ms", time)[1])
        assert abs(shown / derived["forward_backward_ms"] - 1) < 0.005, name
        # A gradient of this size is 1 GiB.
        assert int(memory) == round(derived["extra_gradients"]), name
    assert f"JSD takes {case['derived']['vcrd jsd']['forward_backward_ms']:.2f} ms" in README


def test_the_times_of_the_gpu_on_the_page_of_performance():
    measured = json.loads((ROOT / "docs/performance/loss-h100.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    table = re.search(r"^\| tokens x columns \| vcrd \|.*?\n\n", page, re.MULTILINE | re.DOTALL)[0]
    columns = ("vcrd", "vcrd in place", "vcrd calibrated", "vcrd jsd", "compiled KL")
    columns += ("Liger KL", "Liger JSD", "ModelOpt", "Megatron CE")
    rows = table.strip().splitlines()[2:-1]  # the last one is of the memory
    for case, line in zip(measured["cases"], rows, strict=True):
        title, *cells = line.strip("| ").split("|")
        assert title.startswith(f"{case['case']['tokens']} x {case['case']['columns']} ")
        for name, derived in case["derived"].items():
            times = (derived["forward_ms"], derived["forward_backward_ms"])
            exact = [f"{time:#.3g}" if time >= 1 else f"{time:.2f}" for time in times]
            assert re.findall(r"\d+\.\d+", cells[columns.index(name)]) == exact, (title, name)


def test_the_times_of_the_cpu_are_those_of_the_page_of_performance():
    page = (ROOT / "docs/performance.md").read_text()
    (cells,) = re.findall(r"^\| \[512, 131072\] \| bfloat16 \| 1 \| (.*) \|$", page, re.MULTILINE)
    plain, in_place, modelopt, compiled = (float(cell.split("(")[0]) for cell in cells.split("|"))
    shown = [
        float(cell.removesuffix(" ms") or "nan") for cell in row("two CPU cores, [512, 131072] bfloat16")
    ]
    assert [*shown[:3], shown[5]] == [plain, in_place, round(compiled), round(modelopt)]


def test_the_overhead_of_the_link_is_that_of_the_page_of_performance():
    page = (ROOT / "docs/performance.md").read_text()
    table = re.search(r"^\| payload \| bytes \| step, ready answers.*?\n\n", page, re.MULTILINE | re.DOTALL)[
        0
    ]
    ratios = [line.split("|")[5].strip() for line in table.strip().splitlines()[2:]]
    assert f"took {min(ratios)} to {max(ratios)} times" in README
