"""The findings of many processes as those of one table: alike ones once, others with the nodes that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vcrd.doctor.findings import FAULT, Finding

_MOST_NAMES = 4


def merged(found: Mapping[int, Sequence[Finding]], nodes: Mapping[int, str]) -> list[Finding]:
    """found, nodes: by rank. In the order in which the first rank that has a line has it."""
    lines: list[Finding] = []
    for name in _names(found):
        groups: dict[Finding, list[int]] = {}
        for rank, findings in found.items():
            for finding in dict.fromkeys(findings):
                if finding.name == name:
                    groups.setdefault(finding, []).append(rank)
        lines += _of_one_name(groups, nodes)
    return lines


def _names(found: Mapping[int, Sequence[Finding]]) -> list[str]:
    """In the order of the first that has them; what only others have comes after what it follows there."""
    names: list[str] = []
    for findings in found.values():
        at = 0
        for finding in findings:
            if finding.name not in names:
                names.insert(at, finding.name)
            at = names.index(finding.name) + 1
    return names


def _of_one_name(groups: Mapping[Finding, list[int]], nodes: Mapping[int, str]) -> list[Finding]:
    places = _Places({rank for ranks in groups.values() for rank in ranks}, nodes)
    lines = [
        replace(finding, where=places.where(ranks))
        for finding, ranks in groups.items()
        if finding.status == FAULT
    ]
    others = {finding: ranks for finding, ranks in groups.items() if finding.status != FAULT}
    if len(others) > 1 and all(finding.alike for finding in others):
        return [*lines, _different(others, places)]
    for status in dict.fromkeys(finding.status for finding in others):
        first, *rest = [(finding, ranks) for finding, ranks in others.items() if finding.status == status]
        text = first[0].found
        if rest:
            text += f" (so on {places.where(first[1])}; other figures elsewhere)"
        ranks = sorted(rank for _, some in (first, *rest) for rank in some)
        lines.append(replace(first[0], found=text, where=places.where(ranks)))
    return lines


def _different(groups: Mapping[Finding, list[int]], places: _Places) -> Finding:
    """What most say is taken for what was meant."""
    *odd, (usual, _) = sorted(groups.items(), key=lambda item: len(item[1]))
    parts = [f"{places.where(ranks)}: {finding.found}" for finding, ranks in odd]
    return replace(usual, status=FAULT, found=f"{'; '.join(parts)}; others: {usual.found}", fix=usual.alike)


class _Places:
    """Says where a line is from. speakers: the ranks that have one of this name; some are asked once a node."""

    def __init__(self, speakers: set[int], nodes: Mapping[int, str]) -> None:
        self._nodes = nodes
        firsts = {min(rank for rank in nodes if nodes[rank] == node) for node in nodes.values()}
        self._asked = firsts if speakers <= firsts else set(nodes)

    def where(self, ranks: Sequence[int]) -> str:
        """Nothing for all; the names of nodes where all are meant that were asked there, else ranks."""
        if set(ranks) == self._asked:
            return ""
        return where(ranks, self._asked, self._nodes)


def where(ranks: Sequence[int], asked: set[int], nodes: Mapping[int, str]) -> str:
    names, single = [], []
    for node in dict.fromkeys(nodes[rank] for rank in ranks):
        mine = [rank for rank in ranks if nodes[rank] == node]
        if {rank for rank in asked if nodes[rank] == node} == set(mine):
            names.append(node)
        else:
            single += [f"rank {rank} on {node}" for rank in mine]
    names += single
    more = f" and {len(names) - _MOST_NAMES} others" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
