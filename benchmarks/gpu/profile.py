"""Profiles the loss of vcrd that is furthest from the bandwidth of a copy, with Nsight Compute.

    python -m benchmarks.gpu.profile [--case 1024x32768 --method vcrd] [--json profile.json]

Without --case the shape comes from the results of the benchmark stages; without results it is a small shape. The output
has for each kernel its time, its share of the peak of memory and of arithmetic, the number of active warps and the
longest stall of a warp. All collected metrics are kept. The stage is unavailable if the machine gives no access to the
counters.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.results import FOLDER, read
from benchmarks.gpu.stages import STAGES, tool

FALLBACK = ("1024x32768", "vcrd")  # the slowest shape in the figures of docs/performance.md
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats")
# For each metric: its names in versions of Nsight Compute, and the factor to our unit.
METRICS = {
    "microseconds": (("gpu__time_duration.sum",), 1e-3),
    "memory_percent": (
        (
            "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
            "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        ),
        1.0,
    ),
    "arithmetic_percent": (("sm__throughput.avg.pct_of_peak_sustained_elapsed",), 1.0),
    "active_warps_percent": (("sm__warps_active.avg.pct_of_peak_sustained_active",), 1.0),
}
STALL = re.compile(r"issue_stalled_(?P<reason>\w+?)(_per_issue_active|_per_warp_active)?\.(ratio|pct)$")
NO_ACCESS = "ERR_NVGPUCTRPERM"


def furthest(results: list[dict | None]) -> tuple[str, str, str] | None:
    """(shape, dtype, method) of vcrd's loss with the smallest share of the copy's bandwidth; None without results."""
    found = []
    for result in results:
        for record in (result or {}).get("figures", {}).get("cases", []):
            case = record["case"]
            shape = f"{case['tokens']}x{case['columns']}of{case['vocab']}"
            for method, figures in record["derived"].items():
                if method.startswith("vcrd"):
                    found.append((figures["forward_backward_share_of_copy"], shape, case["dtype"], method))
    return min(found)[1:] if found else None


def parse(text: str) -> list[dict]:
    """Parses ncu's --csv --page raw: for each kernel its name and all numeric metrics, in base units."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels = []
    for row in csv.DictReader(lines[start:]):
        if not (row.get("ID") or "").isdigit():  # the row of units
            continue
        metrics = {}
        for name, value in row.items():
            if name and "__" in name and value:
                try:
                    metrics[name] = float(value.replace(",", ""))
                except ValueError:
                    continue
        launch = {"grid": row.get("Grid Size", ""), "block": row.get("Block Size", "")}
        kernels.append({"kernel": row.get("Kernel Name", ""), **launch, "metrics": metrics})
    return kernels


def figures(kernel: dict) -> dict:
    """The metrics of a kernel for the page; None for those that this Nsight Compute did not collect."""
    metrics = kernel["metrics"]
    found: dict = {"kernel": kernel["kernel"], "grid": kernel["grid"], "block": kernel["block"]}
    for figure, (names, factor) in METRICS.items():
        name = next((name for name in names if name in metrics), None)
        found[figure] = None if name is None else factor * metrics[name]
    stalls = {
        match["reason"]: value
        for name, value in metrics.items()
        if (match := STALL.search(name)) and match["reason"] != "selected" and "not_issued" not in name
    }
    found["longest_stall"] = max(stalls, key=stalls.__getitem__) if stalls else None
    found["metrics"] = metrics
    return found


def profile(shape: str, dtype: str, method: str, folder: Path) -> tuple[str, str]:
    """The log of ncu, and the output of ncu and the child."""
    log = folder / "log"
    child = [
        sys.executable,
        "-m",
        "benchmarks.gpu.profile",
        "--child",
        "--case",
        shape,
        "--dtype",
        dtype,
        "--method",
        method,
    ]
    command = [
        *(str(tool("ncu")), "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)),
        # Only kernels of vcrd, of one call in the child. The clocks stay as in training.
        *("--profile-from-start", "off", "--kernel-name-base", "demangled", "--kernel-name", "regex:vcrd"),
        *("--clock-control", "none", "--launch-count", "8"),
        *(argument for section in SECTIONS for argument in ("--section", section)),
        *child,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return log.read_text(errors="replace") if log.exists() else "", done.stdout


def run_child(shape: str, dtype: str, method: str, device: str = "cuda") -> None:
    """One forward and backward of the method, after warm-ups that are not profiled."""
    import torch

    from device_measure import CLOCKS, Case, DeviceBench
    from device_methods import JOBS
    from device_table import parse_shape

    bench = DeviceBench(Case(*parse_shape(shape), dtype, 1), device, CLOCKS[device]())
    loss = next(job for job in JOBS if job.name == method).build()
    for _ in range(3):
        bench.run(loss)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    bench.run(loss)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def measure(case: tuple[str, str, str], chosen: str) -> dict:
    with TemporaryDirectory() as folder:
        log, printed = profile(*case, Path(folder))
    if NO_ACCESS in log + printed:
        return {"passed": None, "how": "this machine gives no access to the GPU's performance counters"}
    kernels = [figures(kernel) for kernel in parse(log)]
    result = {
        **dict(zip(("shape", "dtype", "method"), case, strict=True)),
        "chosen": chosen,
        "kernels": kernels,
    }
    if not kernels or any(kernel["microseconds"] is None for kernel in kernels):
        return {**result, "passed": False, "output": "\n".join([log[-2000:], printed[-2000:]])}
    return {**result, "passed": True}


def lines(result: dict) -> str:
    if result["passed"] is None:
        return result["how"]
    rows = [f"{result['method']}, {result['shape']} {result['dtype']}, {result['chosen']}"]
    for kernel in result["kernels"]:
        shares = ", ".join(
            f"{kernel[name]:.0f} % {what}"
            for name, what in (
                ("memory_percent", "of the memory's bandwidth"),
                ("arithmetic_percent", "of arithmetic"),
                ("active_warps_percent", "of warps active"),
            )
            if kernel[name] is not None
        )
        rows.append(
            f"  {kernel['kernel'][:60]}: {kernel['microseconds'] or 0:.1f} us, {shares}, "
            f"longest stall: {kernel['longest_stall']}"
        )
    return "\n".join([*rows, *([] if result["passed"] else ["no kernel was profiled", result["output"]])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", metavar="TOKENSxSHARDofVOCAB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default=FALLBACK[1], help="a loss of vcrd, as device_methods.py names it")
    parser.add_argument("--results", type=Path, default=FOLDER, help="of the benchmark's stages")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.case, options.dtype, options.method)
        return 0
    if tool("ncu") is None:
        result: dict = {"passed": None, "how": "ncu is neither on the PATH nor in a CUDA toolkit"}
    else:
        case, chosen = (options.case, options.dtype, options.method), "as asked for"
        if options.case is None:
            names = [stage.name for stage in STAGES if stage.name.startswith("benchmark")]
            found = furthest([read(options.results, name) for name in names])
            case, chosen = (
                found or (FALLBACK[0], "bfloat16", FALLBACK[1]),
                "there are no results of a benchmark",
            )
            chosen = "the furthest from the bandwidth of a copy" if found else chosen
        result = measure(case, chosen)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(lines(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
