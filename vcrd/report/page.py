"""The page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from vcrd.report import charts, time_spent, tokens
from vcrd.report.bins import Bins, over_time
from vcrd.report.run import Run

# As in vcrd.megatron.report: the histogram's bins, which begin at 2^-8.
_BINS, _PER_OCTAVE, _LOWEST = 256, 16, -8
_COLUMNS = 200  # of the heat map
_ROLES = (("student", charts.STUDENT), ("teacher", charts.TEACHER))


def text_of(run: Run, name: str = "") -> str:
    """The whole page. name: its heading; default the folder's name."""
    name = html.escape(name or run.folder.resolve().name)
    body = [_head(run, name), _said(run)]
    if len(run.figures["iteration"]):
        body += [_curves(run), _weights(run), time_spent.steps(run)]
    else:
        body.append('<p class="soft">No figures of training were recorded.</p>')
    body += [_machines(run), time_spent.teachers(run, _times(run)[0])]
    if run.tokens is not None:
        body.append(tokens.section(run.tokens))
    body.append(_settings(run))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    filled = {"@TITLE@": f"vcrd: {name}", "@SCALE@": tokens.scale()}
    for mark, text in filled.items():
        template = template.replace(mark, text)
    return template.replace("@BODY@", "\n".join(part for part in body if part))


def _head(run: Run, name: str) -> str:
    figures = run.figures
    begin, end = _times(run)
    when = datetime.fromtimestamp(begin, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    hosts = sorted({str(record.get("host")) for record in run.starts})
    facts = [("lasted", _duration(end - begin))]
    if len(figures["iteration"]):
        facts.append(("iterations", f"{figures['iteration'][0]:,.0f} to {figures['iteration'][-1]:,.0f}"))
        facts.append(("tokens that counted", f"{np.nansum(figures['tokens']):,.0f}"))
    for role, _ in _ROLES:
        if (layout := _layout(run, role)) is not None:
            facts.append((role, layout))
    if run.starts:
        facts.append(("hosts", hosts[0] if len(hosts) == 1 else str(len(hosts))))
        devices = sorted({record.get("device") or "?" for record in run.starts})
        facts.append(("devices", ", ".join(devices)))
        facts.append(("started again", _times_said(_restarts(run))))
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts
    )
    return f'<h1>{name}</h1><p class="soft">Began {when}.</p><section class="card"><dl>{rows}</dl></section>'


def _said(run: Run) -> str:
    """The sentences of the log, those that repeat as one."""
    found: dict[tuple, list[dict]] = {}
    for record in run.starved:
        found.setdefault((record.get("replica"), record.get("cause")), []).append(record)
    items = []
    for records in sorted(found.values(), key=len, reverse=True):
        worst = max(records, key=lambda record: record.get("share") or 0.0)
        often = _iterations_said([record["iteration"] for record in records])
        items.append(f"<li>{html.escape(_capital(worst['sentence']))}.<small>{often}</small></li>")
    items += [f'<li class="teacher">{html.escape(_capital(record["sentence"]))}.</li>' for record in run.idle]
    if missing := _not_numbers(run):
        items.insert(0, f"<li>The loss was no number (NaN or infinite).<small>{missing}</small></li>")
    if not items and not len(run.figures["iteration"]):
        return ""
    if not items:
        items = ['<li class="well">No interval in which the student waited for 5 % of its step or more.</li>']
    return f"<h2>What stood out</h2><ul class='said'>{''.join(items)}</ul>"


def _not_numbers(run: Run) -> str:
    """In which intervals, of those that had tokens; empty where in none."""
    figures = run.figures
    wrong = np.isnan(figures["loss"]) & (figures["tokens"] > 0)
    return (
        _iterations_said([int(iteration) for iteration in figures["iteration"][wrong]]) if wrong.any() else ""
    )


def _curves(run: Run) -> str:
    figures = run.figures
    bins = Bins(figures["tokens"])
    x = bins.last(figures["iteration"])
    mean = {name: bins.mean(values) for name, values in figures.items()}
    step = Bins(figures["steps"])
    rate = step.sum(figures["tokens"]) / np.maximum(1e-9, step.sum(figures["seconds"]))
    found = [
        charts.lines("Loss", "nats per token", x, [("loss", charts.INK, mean["loss"])], least=0),
        charts.lines(
            "Divergence and cross-entropy",
            "nats per token",
            x,
            [
                ("divergence from the teacher", charts.TEACHER, mean["divergence"]),
                ("cross-entropy", charts.FAINT, mean["cross_entropy"]),
            ],
            least=0,
        ),
        charts.lines(
            "Weight",
            "of a token; 1 is plain distillation",
            x,
            [("mean", charts.TEACHER, mean["weight"])],
            ("10th to 90th percentile", mean["weight_p10"], mean["weight_p90"]),
            least=0,
        ),
        charts.lines(
            "Who is right",
            "% of tokens",
            x,
            [
                ("both favour the same token", charts.TEACHER, 100 * mean["agreement"]),
                ("student the more valid", charts.STUDENT, 100 * mean["student_more_valid"]),
            ],
            least=0,
        ),
        charts.lines("Speed", "tokens per second", x, [("tokens", charts.INK, rate)], least=0),
    ]
    bad = bins.sum(figures["invalid_rows"])
    if bad.any():
        found.append(
            charts.lines("Skipped", "tokens, their teacher none", x, [("", charts.STUDENT, bad)], least=0)
        )
    return f'<h2>Training</h2><div class="grid">{"".join(found)}</div>'


def _weights(run: Run) -> str:
    bins = Bins(run.figures["tokens"], _COLUMNS)
    counts = bins.histograms(run.weights, _BINS)
    if not counts.any():
        return ""
    mean = bins.mean(run.figures["weight"])
    drawn = charts.heat(
        "Weights of the tokens",
        "% of tokens in each bin, over the run",
        bins.last(run.figures["iteration"]),
        counts,
        _LOWEST,
        _PER_OCTAVE,
        mean,
    )
    return f'<div class="grid" style="margin-top:1rem">{drawn}</div>'


def _machines(run: Run) -> str:
    """What each rank's machine did, as a mean and a band over the ranks of a job."""
    sent, received = "nvlink_sent_bytes_per_second", "nvlink_received_bytes_per_second"
    wanted = (
        ("GPU memory", "GB in use, the peak", lambda r: r["gpu_memory_bytes"] / 1e9, None),
        ("GPU utilisation", "% of the time", lambda r: 100 * r["gpu_utilization"], 100),
        ("GPU power", "watts, the peak", lambda r: r["gpu_power_watts"], None),
        ("NVLink", "GB/s, sent and received", lambda r: (r[sent] + r[received]) / 1e9, None),
        ("Link between the jobs", "MB/s of a rank", _link_rate, None),
        ("Host memory", "GB of a process, the peak", lambda r: r["host_memory_bytes"] / 1e9, None),
    )
    begin, end = _times(run)
    found = []
    for title, unit, values_of, most in wanted:
        said: list[str] = []
        groups = []
        for role, colour in _ROLES:
            ranks = {rank: columns for (name, rank), columns in sorted(run.ranks.items()) if name == role}
            values = [values_of(columns) for columns in ranks.values()]
            if any((~np.isnan(each)).any() for each in values):
                hours, rows = over_time(list(ranks.values()), values, begin, end)
                rows = rows[~np.isnan(rows).all(axis=1)]
                groups.append((f"{role}, {_count(len(rows), 'rank')}", colour, hours, rows))
                if values_of is not _link_rate:
                    said.append(_outlier(role, list(ranks), values))
        if groups:
            found.append(charts.bands(title, unit, groups, " ".join(filter(None, said)), most))
    if not found:
        return ""
    none = "" if any("GPU" in chart for chart in found) else " No GPU was measured."
    return (
        '<h2>Machines</h2><p class="soft">A thick line is the mean over the ranks of a job, a thin one each of few '
        f"ranks, a band reaches from the least of many to the largest.{none}</p>"
        f'<div class="grid">{"".join(found)}</div>'
    )


def _outlier(role: str, ranks: Sequence[int], values: Sequence[np.ndarray]) -> str:
    """Which rank has the most, where one has 10 % more than the mean of all."""
    means = np.array([np.nanmean(each) if (~np.isnan(each)).any() else np.nan for each in values])
    most = int(np.nanargmax(means))
    if len(ranks) < 2 or means[most] < 1.1 * np.nanmean(means):
        return ""
    return f"{_capital(role)} rank {ranks[most]} has the most, {means[most]:.3g} in the mean."


def _settings(run: Run) -> str:
    first = next((record for record in run.starts if record["role"] == "student"), None)
    if first is None:
        return ""
    values = {"validity": first.get("validity"), **(first.get("settings") or {}), "torch": first.get("torch")}
    text = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return f'<footer class="soft">Settings: {html.escape(text)}.</footer>'


def _link_rate(columns: dict[str, np.ndarray]) -> np.ndarray:
    """MB/s into a student rank or out of a teacher's."""
    moved = np.where(np.isnan(columns["link_bytes"]), columns["bytes_sent"], columns["link_bytes"])
    if not np.nansum(moved):  # of an earlier stage
        return np.full_like(moved, np.nan)
    return moved / np.maximum(1e-9, columns["seconds"]) / 1e6


def _times(run: Run) -> tuple[float, float]:
    """Of the first record and of the last, in seconds since 1970."""
    times = [record["time"] for record in run.starts]
    for columns in [*run.ranks.values(), run.figures]:
        if len(columns["time"]):
            times += [float(columns["time"][0]), float(columns["time"][-1])]
    return min(times), max(times)


def _layout(run: Run, role: str) -> str | None:
    record = next((record for record in reversed(run.starts) if record["role"] == role), None)
    if record is None:
        return None
    sizes = (
        ("tensor", "tensor_size"),
        ("pipeline", "pipeline_size"),
        ("context", "context_size"),
        ("data", "data_size"),
    )
    split = " x ".join(f"{name} {record[key]}" for name, key in sizes if record.get(key, 1) > 1)
    ranks = _count(record.get("world", 1), "rank")
    return f"{ranks}: {split}" if split else ranks


def _restarts(run: Run) -> int:
    """How often the student's job began once more."""
    begun = [record for record in run.starts if record["role"] == "student"]
    ranks = {record["rank"] for record in begun}
    return max((sum(record["rank"] == rank for record in begun) for rank in ranks), default=1) - 1


def _iterations_said(iterations: Sequence[int]) -> str:
    if len(iterations) == 1:
        return f"iteration {iterations[0]}"
    between = "and" if len(iterations) == 2 else "to"
    return f"{_times_said(len(iterations))}, iterations {iterations[0]} {between} {iterations[-1]}"


def _times_said(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return (
        f"{seconds / 60:.0f} min"
        if seconds < 5400
        else str(timedelta(seconds=round(seconds / 60) * 60))[:-3] + " h"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
