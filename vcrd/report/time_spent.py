"""Where the time went: of the student's step, and of each teacher replica."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vcrd.report import charts
from vcrd.report.bins import Bins
from vcrd.report.run import Run

_COLUMNS = 200  # of a wide chart
_REPLICAS = 4  # that get a chart of their own


def steps(run: Run) -> str:
    """Where a step's time goes. Replicas are waited for side by side, so the longest wait is the step's."""
    figures = run.figures
    bins = Bins(figures["steps"], _COLUMNS)
    count, seconds = bins.sum(figures["steps"]), bins.sum(figures["seconds"])
    if not count.all() or not seconds.any():
        return ""
    replicas = sorted({replica for waits in run.waits for replica in waits})
    waited = np.zeros((len(replicas), len(run.waits)))
    for place, waits in enumerate(run.waits):
        if waits:
            longest = max(waits, key=waits.__getitem__)
            waited[replicas.index(longest), place] = waits[longest]
    rows = [bins.sum(row) for row in waited]
    verifier = bins.sum(figures["verifier_time"])
    parts = [
        (name, colour, part / count) for name, colour, part in _own_time(bins, figures, sum(rows) + verifier)
    ]
    shown, others = rows[: len(charts.REPLICAS) - 1], rows[len(charts.REPLICAS) - 1 :]
    for replica, colour, row in zip(replicas, charts.REPLICAS, shown, strict=False):
        parts.append((f"waiting for teacher replica {replica}", colour, row / count))
    if others:
        parts.append(("for the others", charts.REPLICAS[-1], sum(others) / count))
    if verifier.any():
        parts.append(("verifier", charts.VERIFIER, verifier / count))
    whole = seconds.sum()
    shares = [f"{100 * (part * count).sum() / whole:.0f} % {name}" for name, _, part in parts]
    said = f"Of {whole / count.sum():.3g} s a step in the mean: {', '.join(shares)}."
    if not np.isnan(figures["forward"]).all():
        said += " Seconds of the last rank's host: on a GPU what it waits for stands where it waits."
    if len(replicas) > 1:
        said += " The replicas work side by side: of each interval the longest wait counts."
    x = bins.last(figures["iteration"])
    chart = charts.stacked("A step", "seconds", x, parts, "iteration", said, wide=True)
    return f'<h2>Time</h2><div class="grid">{chart}</div>'


def _own_time(
    bins: Bins, figures: dict[str, np.ndarray], waited: np.ndarray
) -> list[tuple[str, str, np.ndarray]]:
    """What the last rank did when it did not wait. waited: for teacher and verifier, inside its forward steps."""
    seconds = bins.sum(figures["seconds"])
    if np.isnan(figures["forward"]).all():  # of a script that counts no steps, or an earlier vcrd
        return [("computing and all else", charts.COMPUTE[0], np.maximum(0.0, seconds - waited))]
    names = ("forward", "backward, with the pipeline", "adding up gradients", "optimizer and all else")
    forward, backward, gradients = (bins.sum(figures[name]) for name in ("forward", "backward", "gradients"))
    own = [np.maximum(0.0, forward - waited), backward, gradients]
    rest = np.maximum(0.0, seconds - waited - sum(own))
    return [part for part in zip(names, charts.COMPUTE, [*own, rest], strict=True) if part[2].any()]


def teachers(run: Run, begin: float) -> str:
    """How each replica spent its time. begin: of the run, seconds since 1970."""
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
    found = [_teacher(title, ranks, begin) for title, ranks in named]
    return (
        '<h2>Teacher</h2><p class="soft">Computing, waiting for answers to leave for the student, and idle: no request '
        "was there. Of a replica's ranks the one that was the least idle, for the others wait for it.</p>"
        f'<div class="grid">{"".join(found)}</div>'
    )


def _busiest(ranks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    def idle(rank: dict[str, np.ndarray]) -> float:
        idle, answering = np.nansum(rank["idle"]), np.nansum(rank["answering"])
        return idle / (idle + answering)

    return min(ranks, key=idle)


def _teacher(title: str, ranks: Sequence[dict[str, np.ndarray]], begin: float) -> str:
    columns = {name: np.concatenate([rank[name] for rank in ranks]) for name in ranks[0]}
    order = np.argsort(columns["time"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    bins = Bins(columns["seconds"], min(_COLUMNS, max(len(rank["time"]) for rank in ranks)))
    whole = np.maximum(1e-9, bins.sum(columns["seconds"]))
    answering, sending, idle = (bins.sum(columns[name]) / whole for name in ("answering", "sending", "idle"))
    sending = np.minimum(sending, answering)
    computing = answering - sending
    parts = [
        ("computing", charts.TEACHER, 100 * computing),
        ("sending", charts.REPLICAS[2], 100 * sending),
        ("idle", charts.IDLE, 100 * idle),
    ]
    x = (bins.last(columns["time"]) - begin) / 60
    served = ((idle + answering) * whole).sum()
    said = f"Idle {100 * (idle * whole).sum() / served:.0f} % of the time in which a student was there."
    return charts.stacked(title, "% of the time", x, parts, "minutes since the start", said, most=100)
