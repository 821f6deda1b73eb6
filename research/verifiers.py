"""Verifiers that err: at random, or always on the same symbols."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from data import SYMBOLS, encode
from problems import END, Family


@dataclass(frozen=True)
class Verifier:
    """share: of the verdicts that are wrong, at random. tokens: every verdict on one of these is wrong."""

    share: float = 0.0
    tokens: tuple[int, ...] = ()

    def __call__(self, right: Tensor, actions: Tensor, generator: torch.Generator) -> Tensor:
        """The verdicts, from the right ones, bool, and the judged tokens, both of one shape; -1 for no token."""
        if self.share:
            right = right ^ (torch.rand(right.shape, generator=generator) < self.share).to(right.device)
        if self.tokens:
            wrong = torch.zeros(len(SYMBOLS), dtype=torch.bool, device=right.device)
            wrong[list(self.tokens)] = True
            right = right ^ (wrong[actions.clamp(min=0)] & (actions >= 0))
        return right


RIGHT = Verifier()


def systematic(family: Family, share: float) -> Verifier:
    """A verifier that is always wrong about some symbols, and right about all others.

    The symbols are drawn by their code from those of 200 random solutions, without END, while they make up at most
    `share` of these; one at least.
    """
    rng = random.Random(8)
    counts = Counter("".join(family(rng, False).solution(rng) for _ in range(200)).replace(END, ""))
    chosen, left = [], share * counts.total()
    for symbol in sorted(counts, key=lambda symbol: zlib.crc32(symbol.encode() * 2)):
        if counts[symbol] <= left:
            chosen.append(symbol)
            left -= counts[symbol]
    return Verifier(tokens=tuple(encode("".join(chosen or [min(counts, key=counts.get)]))))
