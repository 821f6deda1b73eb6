"""Stacks of small decoders with one shape. Their weights are stacked, and the models do not influence each other.

Measured on a core with models of 17,592 parameters: a stack of twenty generates in a quarter of the time of twenty
single models, and trains in the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    vocab: int

    @property
    def parameters(self) -> int:
        return 2 * self.vocab * self.width + self.layers * (12 * self.width**2 + 2 * self.width) + self.width


class Stack(nn.Module):
    """`count` decoders of one shape. Tokens are int64 [count, b, s], logits float32 [count, b, s, vocab]."""

    def __init__(self, shape: Shape, count: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.count = shape, count
        generator = torch.Generator().manual_seed(seed)
        w, deep = shape.width, (2 * shape.layers) ** -0.5

        def weight(rows: int, columns: int, scale: float) -> nn.Parameter:
            # All have the same initial weights. Only their training differs.
            one = torch.randn(rows, columns, generator=generator) * scale
            return nn.Parameter(one.expand(count, -1, -1).clone())

        self.embedding = weight(shape.vocab, w, 0.02)
        self.head = weight(w, shape.vocab, 0.02)
        self.norm = nn.Parameter(torch.ones(count, 1, 1, w))
        self.layers = nn.ModuleList()
        for _ in range(shape.layers):
            layer = nn.Module()
            layer.norm_in, layer.norm_mid = (nn.Parameter(torch.ones(count, 1, 1, w)) for _ in range(2))
            layer.qkv, layer.out = weight(w, 3 * w, w**-0.5), weight(w, w, w**-0.5 * deep)
            layer.up, layer.down = weight(w, 4 * w, w**-0.5), weight(4 * w, w, (4 * w) ** -0.5 * deep)
            self.layers.append(layer)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of these tokens. cache: of the earlier tokens; these tokens are added to it."""
        m, b, s = tokens.shape
        rows = tokens + self.shape.vocab * torch.arange(m, device=tokens.device)[:, None, None]
        x = F.embedding(rows, self.embedding.flatten(0, 1))
        before = cache.filled if cache else 0
        cos, sin = _rotations(before, s, self.shape.width // self.shape.heads, tokens.device)
        for number, layer in enumerate(self.layers):
            qkv = _times(_normed(x, layer.norm_in), layer.qkv)
            qk, v = qkv.view(m * b, s, 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4).split((2, 1))
            (q, k), v = _rotated(qk, cos, sin), v[0]
            if cache is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = cache.attended(number, q, k, v)
            x = x + _times(y.transpose(1, 2).reshape(m, b, s, -1), layer.out)
            x = x + _times(F.gelu(_times(_normed(x, layer.norm_mid), layer.up)), layer.down)
        if cache:
            cache.filled += s
        return _times(_normed(x, self.norm), self.head)

    def take(self, other: Stack, places: Sequence[int]) -> None:
        """Copies the decoder at that place of the other stack into each decoder."""
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs[list(places)])


class Cache:
    """Keys and values of up to `length` tokens of [count, b] rows, with padding [count, b] at their left."""

    def __init__(self, models: Stack, padding: Tensor, length: int) -> None:
        shape = models.shape
        size = (padding.numel(), shape.heads, length, shape.width // shape.heads)
        self._pairs = [
            tuple(torch.zeros(size, device=padding.device) for _ in range(2)) for _ in models.layers
        ]
        self._padding = padding
        self.filled = 0

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All [rows, heads, s, width]."""
        first, last = self.filled, self.filled + q.shape[2]
        keys, values = (each[:, :, :last] for each in self._pairs[layer])
        keys[:, :, first:], values[:, :, first:] = k, v
        places = torch.arange(last, device=q.device)
        # Padding attends to itself: a softmax over nothing would be NaN, and NaN times zero would reach the others.
        seen = (places >= self._padding.view(-1, 1, 1, 1)) | (places == places[first:, None])
        seen = seen & (places <= places[first:, None])
        # Written out, because the fused kernel takes several times as long for one query.
        scores = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows of each decoder, int64 [count, fewer]."""
        count, b = self._padding.shape
        flat = (rows + b * torch.arange(count, device=rows.device)[:, None]).flatten()
        self._pairs = [(k[flat], v[flat]) for k, v in self._pairs]
        self._padding = self._padding.gather(1, rows)


@torch.no_grad()
def generate(
    models: Stack, prompts: Tensor, padding: Tensor, length: int, end: int, chances: Tensor | None = None
) -> Tensor:
    """prompts [count, b, s], at the left of each row padding [count, b] -> [count, b, length]; zeros follow `end`.

    Takes the most probable tokens, or samples with chances, float [b, length] within 0..1, the same for each decoder.
    """
    count, b, s = prompts.shape
    cache = Cache(models, padding, s + length)
    device = prompts.device
    found = torch.zeros(count, b, length, dtype=torch.int64, device=device)
    rows = torch.arange(b, device=device).expand(count, b)  # rows that have not ended, and some that have
    step, ended = prompts, torch.zeros(count, b, dtype=torch.bool, device=device)
    for place in range(length):
        logits = models(step, cache)[:, :, -1]
        if chances is None:
            step = logits.argmax(-1)
        else:
            reached = logits.softmax(-1).cumsum(-1) < chances[:, place][rows][..., None]
            step = reached.sum(-1).clamp(max=logits.shape[-1] - 1)
        step = torch.where(ended, 0, step)
        found[:, :, place].scatter_(1, rows, step)
        ended = ended | (step == end)
        left = int((~ended).sum(1).max())
        if not left:
            break
        if left <= 0.75 * rows.shape[1]:
            kept = ended.int().argsort(dim=1, stable=True)[:, :left]
            cache.keep(kept)
            rows, step, ended = rows.gather(1, kept), step.gather(1, kept), ended.gather(1, kept)
        step = step[..., None]
    return found


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """[m, b, s, in] times [m, in, out]."""
    m, b, s, width = x.shape
    return torch.bmm(x.reshape(m, b * s, width), weight).view(m, b, s, -1)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight


def _rotations(first: int, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary position embeddings, for positions first, first + 1 ..."""
    half = width // 2
    places, turns = (torch.arange(*each, device=device) for each in ((first, first + count), (half,)))
    angles = places[:, None] / 100.0 ** (turns / half)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
