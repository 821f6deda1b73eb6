"""The profile of `make gpu-check` without a profiler: its choice of a shape, and reading a given report."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu import profile
from benchmarks.gpu.results import write

# Written by hand from ncu's documentation of --csv --page raw (units in the second row), not the output of a run.
HEADER = (
    '"ID","Process ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum",'
    '"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","sm__throughput.avg.pct_of_peak_sustained_elapsed",'
    '"sm__warps_active.avg.pct_of_peak_sustained_active","launch__function_pcs",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"'
)
REPORT = f"""==PROF== Connected to process 7
==PROF== Profiling "statistics_kernel": 0%....100% - 9 passes
{HEADER}
"","","","","","nsecond","%","%","%","","inst","inst","inst"
"0","7","void vcrd::cuda::statistics<(int)1>(Params, Grid)","(256, 1, 1)","(1024, 1, 1)","81,920.00","77.5","41.25",\
"88.1","n/a","9.5","2.5","20.0"
"1","7","vcrd::cuda::merge(Params)","(128, 1, 1)","(8, 1, 1)","2048","3.5","1.25","10","n/a","0","4.5","1"
"""


def result(shape: tuple[int, int, int], **shares: float) -> dict:
    case = dict(zip(("tokens", "columns", "vocab"), shape, strict=True), dtype="bfloat16", repeats=15)
    derived = {name: {"forward_backward_share_of_copy": share} for name, share in shares.items()}
    return {"figures": {"cases": [{"case": case, "derived": derived}]}}


def test_it_takes_the_loss_of_vcrd_that_is_furthest_from_a_copy():
    results = [
        None,
        {"figures": {}},
        result((4096, 131072, 131072), **{"vcrd": 0.98, "vcrd jsd": 0.83, "Liger KL": 0.11}),
        result((1024, 4096, 32768), **{"vcrd": 0.77, "vcrd in place": 0.79}),
    ]
    assert profile.furthest(results) == ("1024x4096of32768", "bfloat16", "vcrd")
    assert profile.furthest(results[:3]) == ("4096x131072of131072", "bfloat16", "vcrd jsd")
    assert profile.furthest(results[:2]) is None


def test_a_report_is_read():
    first, second = (profile.figures(kernel) for kernel in profile.parse(REPORT))
    metrics = first.pop("metrics")
    assert first == {
        "kernel": "void vcrd::cuda::statistics<(int)1>(Params, Grid)",
        "grid": "(1024, 1, 1)",
        "block": "(256, 1, 1)",
        "microseconds": pytest.approx(81.92),
        "memory_percent": 77.5,
        "arithmetic_percent": 41.25,
        "active_warps_percent": 88.1,
        "longest_stall": "long_scoreboard",
    }
    assert "launch__function_pcs" not in metrics and metrics["gpu__time_duration.sum"] == 81920
    assert second["longest_stall"] == "barrier"
    assert profile.parse("==ERROR== nothing was profiled") == []


@pytest.mark.parametrize(
    ("log", "printed", "passed"),
    [
        (REPORT, "", True),
        ("==WARNING== No kernels were profiled", "Traceback", False),
        ("", "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", None),
    ],
)
def test_it_passes_fails_or_is_unavailable(monkeypatch, tmp_path, capsys, log, printed, passed):
    asked = []
    monkeypatch.setattr(profile, "tool", lambda name: f"/cuda/bin/{name}")
    monkeypatch.setattr(profile, "profile", lambda *case: asked.append(case[:3]) or (log, printed))
    write(tmp_path / "gpu", "benchmark-headline", result((1024, 32768, 32768), vcrd=0.5))
    path = tmp_path / "profile.json"
    monkeypatch.setattr(sys, "argv", ["p", "--results", str(tmp_path / "gpu"), "--json", str(path)])
    assert profile.main() == (1 if passed is False else 0)
    assert asked == [("1024x32768of32768", "bfloat16", "vcrd")]
    written = json.loads(path.read_text())
    assert written["passed"] is passed
    assert "no access" in written["how"] if passed is None else written["method"] == "vcrd"
    assert capsys.readouterr().out


def test_the_profile_has_one_call_of_the_method():
    profile.run_child("24x515", "bfloat16", profile.FALLBACK[1], "cpu")
