"""The page of a run, section by section: one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from vcrd.report import charts, style
from vcrd.report.bins import Bins, over_time
from vcrd.report.run import Run

# The bins of the histogram in vcrd.megatron.report, which begin at 2^-8.
_BINS, _PER_OCTAVE, _LOWEST = 256, 16, -8
_COLUMNS = 200  # of a wide chart
_REPLICAS = 4  # replicas that get a chart of their own
_SAMPLES = 2  # texts that the page shows
_DIVERGENCES = {
    "forward_kl": "KL divergence, teacher to student",
    "reverse_kl": "KL divergence, student to teacher",
    "jsd": "Jensen-Shannon divergence",
}
_ROLES = (("student", style.STUDENT), ("teacher", style.TEACHER))


def text_of(run: Run, name: str = "") -> str:
    """The whole page. name: its heading, by default the name of the folder."""
    name = html.escape(name or run.folder.resolve().name)
    body = [_head(run, name), _warnings(run)]
    if len(run.figures["iteration"]):
        body += [_curves(run), _weights(run), _step_time(run)]
    else:
        body.append('<p class="soft">No training metrics were recorded.</p>')
    body += [_machines(run), _teacher_time(run, _times(run)[0])]
    if run.tokens is not None:
        body.append(_tokens(run.tokens))
    body.append(_settings(run))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    filled = {"@TITLE@": f"vcrd: {name}", "@COLOURS@": style.css(), "@SCALE@": _colour_scale()}
    for mark, text in filled.items():
        template = template.replace(mark, text)
    return template.replace("@BODY@", "\n".join(part for part in body if part))


def _head(run: Run, name: str) -> str:
    figures = run.figures
    begin, end = _times(run)
    when = datetime.fromtimestamp(begin, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    hosts = sorted({str(record.get("host")) for record in run.starts})
    facts = [("duration", _duration(end - begin))]
    if len(figures["iteration"]):
        facts.append(("iterations", f"{figures['iteration'][0]:,.0f} to {figures['iteration'][-1]:,.0f}"))
        facts.append(("tokens trained on", f"{np.nansum(figures['tokens']):,.0f}"))
    for role, _ in _ROLES:
        if (layout := _layout(run, role)) is not None:
            facts.append((role, layout))
    if run.starts:
        facts.append(("hosts", hosts[0] if len(hosts) == 1 else str(len(hosts))))
        devices = sorted({record.get("device") or "?" for record in run.starts})
        facts.append(("devices", ", ".join(devices)))
        facts.append(("restarts", _times_said(_restarts(run))))
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts
    )
    return (
        f'<h1>{name}</h1><p class="soft">Started {when}.</p><section class="card"><dl>{rows}</dl></section>'
    )


def _warnings(run: Run) -> str:
    """The warnings of the log. Repeated warnings are shown once."""
    found: dict[tuple, list[dict]] = {}
    for record in run.starved:
        found.setdefault((record.get("teacher"), record.get("replica"), record.get("cause")), []).append(
            record
        )
    items = []
    for records in sorted(found.values(), key=len, reverse=True):
        worst = max(records, key=lambda record: record.get("share") or 0.0)
        often = _iterations_said([record["iteration"] for record in records])
        items.append(f"<li>{html.escape(_capital(worst['sentence']))}.<small>{often}</small></li>")
    items += [f'<li class="teacher">{html.escape(_capital(record["sentence"]))}.</li>' for record in run.idle]
    if missing := _not_numbers(run):
        items.insert(0, f"<li>The loss was NaN or infinite.<small>{missing}</small></li>")
    if not items and not len(run.figures["iteration"]):
        return ""
    if not items:
        items = ['<li class="well">The student never waited for 5 % of its step or more.</li>']
    return f"<h2>Warnings</h2><ul class='said'>{''.join(items)}</ul>"


def _not_numbers(run: Run) -> str:
    """The intervals with tokens whose loss was NaN or infinite; empty if there were none."""
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
        charts.lines("Loss", "nats per token", x, [("loss", style.INK, mean["loss"])], least=0),
        charts.lines(
            "Divergence and cross-entropy",
            "nats per token",
            x,
            [
                (_divergence(run), style.TEACHER, mean["divergence"]),
                ("cross-entropy of the next token", style.FAINT, mean["cross_entropy"]),
            ],
            least=0,
        ),
        charts.lines(
            "Weight",
            "of a token; 1 is plain distillation",
            x,
            [("mean", style.TEACHER, mean["weight"])],
            ("10th to 90th percentile", mean["weight_p10"], mean["weight_p90"]),
            least=0,
        ),
        charts.lines(
            "Agreement",
            "% of tokens",
            x,
            [
                ("both prefer the same token", style.TEACHER, 100 * mean["agreement"]),
                ("student more valid", style.STUDENT, 100 * mean["student_more_valid"]),
            ],
            least=0,
        ),
        charts.lines("Speed", "tokens per second", x, [("tokens", style.INK, rate)], least=0),
    ]
    bad = bins.sum(figures["invalid_rows"])
    if bad.any():
        found.append(
            charts.lines("Skipped tokens", "invalid teacher rows", x, [("", style.STUDENT, bad)], least=0)
        )
    return f'<h2>Training</h2><div class="grid">{"".join(found)}</div>'


def _divergence(run: Run) -> str:
    """What the curve of the divergence shows, in words."""
    first = next((record for record in run.starts if record["role"] == "student"), {})
    return _DIVERGENCES.get((first.get("settings") or {}).get("divergence"), "divergence from the teacher")


def _weights(run: Run) -> str:
    bins = Bins(run.figures["tokens"], _COLUMNS)
    counts = bins.histograms(run.weights, _BINS)
    if not counts.any():
        return ""
    mean = bins.mean(run.figures["weight"])
    drawn = charts.heat(
        "Weights of the tokens",
        "% of tokens in each bin, over the run; orange: the mean",
        bins.last(run.figures["iteration"]),
        counts,
        _LOWEST,
        _PER_OCTAVE,
        mean,
    )
    return f'<div class="grid" style="margin-top:1rem">{drawn}</div>'


def _step_time(run: Run) -> str:
    """The time of a step. A rank waits for one replica of each teacher, and the ranks wait at the same time, so the
    longest wait for each teacher counts."""
    figures = run.figures
    bins = Bins(figures["steps"], _COLUMNS)
    count, seconds = bins.sum(figures["steps"]), bins.sum(figures["seconds"])
    if not count.all() or not seconds.any():
        return ""
    replicas = sorted({replica for waits in run.waits for replica in waits})
    waited = np.zeros((len(replicas), len(run.waits)))
    for place, waits in enumerate(run.waits):
        for teacher in {teacher for teacher, _ in waits}:
            of_teacher = [each for each in waits if each[0] == teacher]
            longest = max(of_teacher, key=waits.__getitem__)
            waited[replicas.index(longest), place] = waits[longest]
    rows = [bins.sum(row) for row in waited]
    verifier = bins.sum(figures["verifier_time"])
    parts = [
        (name, colour, part / count) for name, colour, part in _own_time(bins, figures, sum(rows) + verifier)
    ]
    shown, others = rows[: len(charts.REPLICAS) - 1], rows[len(charts.REPLICAS) - 1 :]
    for (teacher, replica), colour, row in zip(replicas, charts.REPLICAS, shown, strict=False):
        who = f"replica {replica} of teacher {teacher}" if teacher else f"teacher replica {replica}"
        parts.append((f"waiting for {who}", colour, row / count))
    if others:
        parts.append(("waiting for other replicas", charts.REPLICAS[-1], sum(others) / count))
    if verifier.any():
        parts.append(("verifier", charts.VERIFIER, verifier / count))
    whole = seconds.sum()
    shares = [f"{100 * (part * count).sum() / whole:.0f} % {name}" for name, _, part in parts]
    said = f"Mean step of {whole / count.sum():.3g} s: {', '.join(shares)}."
    if not np.isnan(figures["forward"]).all():
        said += " Host time of the last rank: GPU work counts where the host waits for it."
    if len(replicas) > len({teacher for teacher, _ in replicas}):
        said += " The replicas work in parallel, so the longest wait of each interval counts."
    x = bins.last(figures["iteration"])
    chart = charts.stacked("A step", "seconds", x, parts, "iteration", said, wide=True)
    return f'<h2>Time</h2><div class="grid">{chart}</div>'


def _own_time(
    bins: Bins, figures: dict[str, np.ndarray], waited: np.ndarray
) -> list[tuple[str, str, np.ndarray]]:
    """The time of the last rank without waiting. waited: for teacher and verifier, within its forward steps."""
    seconds = bins.sum(figures["seconds"])
    if np.isnan(figures["forward"]).all():  # older records and some scripts have no times of parts
        return [("computing and other", charts.COMPUTE[0], np.maximum(0.0, seconds - waited))]
    names = ("forward", "backward and pipeline", "gradient reduction", "optimizer and other")
    forward, backward, gradients = (bins.sum(figures[name]) for name in ("forward", "backward", "gradients"))
    own = [np.maximum(0.0, forward - waited), backward, gradients]
    rest = np.maximum(0.0, seconds - waited - sum(own))
    return [part for part in zip(names, charts.COMPUTE, [*own, rest], strict=True) if part[2].any()]


def _teacher_time(run: Run, begin: float) -> str:
    """The time of each replica. begin: start of the run, in seconds since 1970."""
    replica_of = {
        record["rank"]: record.get("data_rank", 0) for record in run.starts if record["role"] == "teacher"
    }
    replicas: dict[int, list[dict[str, np.ndarray]]] = {}
    for (role, rank), columns in sorted(run.ranks.items()):
        if role == "teacher" and np.nansum(columns["answering"]) > 0:
            replicas.setdefault(replica_of.get(rank, 0), []).append(columns)
    if not replicas:
        return ""
    named = [(f"Teacher replica {number}", [_busiest(ranks)]) for number, ranks in sorted(replicas.items())]
    if len(named) > _REPLICAS:
        named = [(f"Teacher, mean of {len(named)} replicas", [rank for _, ranks in named for rank in ranks])]
    found = [_teacher_chart(title, ranks, begin) for title, ranks in named]
    return (
        '<h2>Teacher</h2><p class="soft">Computing, waiting until responses are sent, and idle without a request. '
        "Each chart shows the rank of the replica that is idle least, since the other ranks wait for it.</p>"
        f'<div class="grid">{"".join(found)}</div>'
    )


def _busiest(ranks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    def idle(rank: dict[str, np.ndarray]) -> float:
        idle, answering = np.nansum(rank["idle"]), np.nansum(rank["answering"])
        return idle / (idle + answering)

    return min(ranks, key=idle)


def _teacher_chart(title: str, ranks: Sequence[dict[str, np.ndarray]], begin: float) -> str:
    columns = {name: np.concatenate([rank[name] for rank in ranks]) for name in ranks[0]}
    order = np.argsort(columns["time"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    bins = Bins(columns["seconds"], min(_COLUMNS, max(len(rank["time"]) for rank in ranks)))
    whole = np.maximum(1e-9, bins.sum(columns["seconds"]))
    answering, sending, idle = (bins.sum(columns[name]) / whole for name in ("answering", "sending", "idle"))
    sending = np.minimum(sending, answering)
    computing = answering - sending
    parts = [
        ("computing", style.TEACHER, 100 * computing),
        ("sending", charts.REPLICAS[2], 100 * sending),
        ("idle", charts.IDLE, 100 * idle),
    ]
    x = (bins.last(columns["time"]) - begin) / 60
    served = ((idle + answering) * whole).sum()
    said = f"Idle {100 * (idle * whole).sum() / served:.0f} % of the time in which a student was connected."
    return charts.stacked(title, "% of the time", x, parts, "minutes since the start", said, most=100)


def _machines(run: Run) -> str:
    """Measurements of the machines, as a mean and a band over the ranks of each job."""
    sent, received = "nvlink_sent_bytes_per_second", "nvlink_received_bytes_per_second"
    wanted = (
        ("GPU memory", "GB in use, peak", lambda r: r["gpu_memory_bytes"] / 1e9, None),
        ("GPU utilisation", "% of the time", lambda r: 100 * r["gpu_utilization"], 100),
        ("GPU power", "watts, peak", lambda r: r["gpu_power_watts"], None),
        ("NVLink", "GB/s, sent and received", lambda r: (r[sent] + r[received]) / 1e9, None),
        ("Link between the jobs", "MB/s per rank", _link_rate, None),
        ("Host memory", "GB per process, peak", lambda r: r["host_memory_bytes"] / 1e9, None),
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
                # The no-break space keeps the number beside its word.
                name = f"{role}, {_count(len(rows), 'rank')}".replace(" rank", "\N{NO-BREAK SPACE}rank")
                groups.append((name, colour, hours, rows))
                if values_of is not _link_rate:
                    said.append(_outlier(role, list(ranks), values))
        if groups:
            found.append(charts.bands(title, unit, groups, " ".join(filter(None, said)), most))
    if not found:
        return ""
    none = "" if any("GPU" in chart for chart in found) else " No GPU was measured."
    return (
        '<h2>Machines</h2><p class="soft">The thick line is the mean over the ranks of a job. Thin lines show single '
        f"ranks; with many ranks a band shows the minimum and the maximum.{none}</p>"
        f'<div class="grid">{"".join(found)}</div>'
    )


def _outlier(role: str, ranks: Sequence[int], values: Sequence[np.ndarray]) -> str:
    """Names the rank with the largest mean, if it is 10 % above the mean of all ranks."""
    means = np.array([np.nanmean(each) if (~np.isnan(each)).any() else np.nan for each in values])
    most = int(np.nanargmax(means))
    if len(ranks) < 2 or means[most] < 1.1 * np.nanmean(means):
        return ""
    return f"{_capital(role)} rank {ranks[most]} has the largest mean, {means[most]:.3g}."


def _colour_scale() -> str:
    return f"linear-gradient(90deg, {', '.join(style.token_background(step / 20) for step in range(21))})"


def _tokens(content: dict[str, Any]) -> str:
    """content: floor, ceiling of the weights; samples: [{name, text, stages: {stage: [[token, weight], ..]}}, ..]."""
    low, high = content["floor"], content["ceiling"]
    parts = [
        "<h2>Weights in a text</h2>",
        '<p class="soft">Solutions that were not used in training, as written. Blue: a large weight, because '
        "the teacher is more valid. Orange: a small weight, because the student is more valid. No colour: as in plain "
        "distillation.</p>",
        '<section class="card"><div class="scale"></div><div class="ends">',
        f"<span>weight {low:g}</span><span>{(low + high) / 2:g}</span><span>{high:g}</span></div>",
    ]
    for sample in content["samples"][:_SAMPLES]:
        name, text = html.escape(sample["name"]), html.escape(sample["text"])
        parts.append(f'<p class="question"><b>{name}</b>{text}</p>')
        for stage, rows in sample["stages"].items():
            mean = sum(weight for _, weight in rows) / max(1, len(rows))
            parts.append(f"<h3>{html.escape(stage)} <span>mean weight {mean:.2f}</span></h3>")
            spans = "".join(_token(text, weight, low, high) for text, weight in rows)
            parts.append(f'<div class="tokens">{spans}</div>')
    return "\n".join([*parts, "</section>"])


def _token(text: str, weight: float, low: float, high: float) -> str:
    part = 0.5 if high == low else (weight - low) / (high - low)
    shown = html.escape(text)
    return (
        f'<span style="background:{style.token_background(part)}" title="weight {weight:.2f}">{shown}</span>'
    )


def _settings(run: Run) -> str:
    first = next((record for record in run.starts if record["role"] == "student"), None)
    if first is None:
        return ""
    values = {"validity": first.get("validity"), **(first.get("settings") or {}), "torch": first.get("torch")}
    text = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return f'<footer class="soft">Settings: {html.escape(text)}.</footer>'


def _link_rate(columns: dict[str, np.ndarray]) -> np.ndarray:
    """MB/s into a student rank or out of a teacher rank."""
    moved = np.where(np.isnan(columns["link_bytes"]), columns["bytes_sent"], columns["link_bytes"])
    if not np.nansum(moved):  # ranks of earlier stages
        return np.full_like(moved, np.nan)
    return moved / np.maximum(1e-9, columns["seconds"]) / 1e6


def _times(run: Run) -> tuple[float, float]:
    """Times of the first and the last record, in seconds since 1970."""
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
    """How often the student job restarted."""
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
