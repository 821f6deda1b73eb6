"""Reduces many points to as many as a screen can show. Sums keep all points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 300  # points of one curve


class Bins:
    """At most `most` groups of neighbouring entries of almost equal size. weights: of the entries in a mean."""

    def __init__(self, weights: np.ndarray, most: int = MOST) -> None:
        count = len(weights)
        self.starts = np.unique(np.linspace(0, count, min(most, count), endpoint=False).astype(int))
        self._weights = weights

    def __len__(self) -> int:
        return len(self.starts)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.nan_to_num(values), self.starts) if len(self.starts) else np.empty(0)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean of each group; NaN if nothing was measured."""
        weights = np.where(np.isnan(values), 0.0, self._weights)
        total = self.sum(weights)
        return np.divide(self.sum(values * weights), total, out=np.full(len(self), np.nan), where=total > 0)

    def last(self, values: np.ndarray) -> np.ndarray:
        """The last entry of each group."""
        return values[np.append(self.starts[1:], len(values)) - 1]

    def histograms(self, rows: Sequence[tuple[int, np.ndarray]], bins: int) -> np.ndarray:
        """[bins, groups]: sums of histograms. rows: each as (first bin, counts)."""
        found = np.zeros((bins, len(self)))
        group = np.searchsorted(self.starts, np.arange(len(rows)), side="right") - 1
        for (first, counts), column in zip(rows, group, strict=True):
            counts = counts[: max(0, bins - first)]
            found[first : first + len(counts), column] += counts
        return found


def over_time(
    ranks: Sequence[dict[str, np.ndarray]], values: Sequence[np.ndarray], begin: float, end: float
) -> tuple[np.ndarray, np.ndarray]:
    """(hours since begin, [ranks, hours]): means over slices of time, NaN if a rank measured nothing in a slice.

    A paused run therefore has a gap.
    """
    longest = max((len(rank["time"]) for rank in ranks), default=1)
    slices = max(1, min(MOST, longest // 2))  # ranks do not record at the same moments
    edges = np.linspace(begin, max(end, begin + 1e-3), slices + 1)
    rows = np.full((len(ranks), slices), np.nan)
    for row, rank, value in zip(rows, ranks, values, strict=True):
        there = ~np.isnan(value)
        place = np.clip(np.searchsorted(edges, rank["time"][there], side="left") - 1, 0, slices - 1)
        count = np.bincount(place, minlength=slices)
        total = np.bincount(place, weights=value[there], minlength=slices)
        np.divide(total, count, out=row, where=count > 0)
    some = ~np.isnan(rows).all(axis=0)
    return (edges[:-1] + np.diff(edges) / 2 - begin)[some] / 3600, rows[:, some]
