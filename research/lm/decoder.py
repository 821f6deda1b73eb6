"""A Llama decoder with tied embeddings, as SmolLM2 is one, and its generation in batches with a cache.

transformers has the same model. This one keeps the cache in place, attends without copies of its keys, and drops rows
that have ended, so that the launches of kernels do not dominate the generation on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.model import Shape
from lm.text import PAD


class Decoder(nn.Module):
    """Parameters are float32 by default; matrix products are computed in `compute`. Tokens are int64 [b, s]."""

    def __init__(self, shape: Shape, layers: int, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.compute = shape, compute
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(layers))

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def start(self, seed: int) -> Decoder:
        """Random weights."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3 * parameter.shape[1] ** -0.5, generator=generator)
        return self

    @torch.no_grad()
    def load(self, fetch: Callable[[str], Tensor], kept: Sequence[int]) -> Decoder:
        """Weights by their names in Hugging Face. kept: the layers that become layers 0, 1, 2 .."""
        self.embedding.copy_(fetch("model.embed_tokens.weight"))
        self.norm.copy_(fetch("model.norm.weight"))
        for layer, source in zip(self.layers, kept, strict=True):

            def of(name: str, source: int = source) -> Tensor:
                return fetch(f"model.layers.{source}.{name}.weight")

            layer.norm_in.copy_(of("input_layernorm"))
            layer.norm_mid.copy_(of("post_attention_layernorm"))
            layer.qkv.copy_(torch.cat([of(f"self_attn.{name}_proj") for name in "qkv"]))
            layer.out.copy_(of("self_attn.o_proj"))
            layer.gate_up.copy_(torch.cat([of(f"mlp.{name}_proj") for name in ("gate", "up")]))
            layer.down.copy_(of("mlp.down_proj"))
        return self

    @torch.no_grad()
    def part(self, kept: Sequence[int]) -> Decoder:
        """A float32 copy with these of its layers."""
        model = Decoder(self.shape, len(kept), self.compute).to(self.device)
        whole = {name: value for name, value in self.named_parameters() if not name.startswith("layers.")}
        for number, source in enumerate(kept):
            whole |= {
                f"layers.{number}.{name}": each for name, each in self.layers[source].named_parameters()
            }
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name])
        return model

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [b, s, hidden], normed. cache: of the earlier tokens; these tokens are added to it."""
        x = F.embedding(tokens, self.embedding).float()
        rotation = self._rotation(cache.filled if cache else 0, tokens.shape[1])
        for number, layer in enumerate(self.layers):
            x = layer(x, rotation, self, number, cache)
        if cache:
            cache.filled += tokens.shape[1]
        return self.normed(x, self.norm)

    def _rotation(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embeddings, float32 also in a model of another dtype."""
        half = self.shape.head_size // 2
        turns = self.shape.rope_base ** -(torch.arange(half, device=self.device) / half)
        angles = torch.arange(first, first + count, device=self.device)[:, None] * turns
        return angles.cos(), angles.sin()

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., hidden] -> [.., vocabulary], in `compute`."""
        return self.times(hidden, self.embedding)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.shape.norm_epsilon) * weight.float()

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self.compute), weight.to(self.compute))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        wide, hidden = shape.heads * shape.head_size, shape.hidden
        rows = (shape.heads + 2 * shape.groups) * shape.head_size
        self.norm_in, self.norm_mid = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.qkv, self.out = nn.Parameter(torch.empty(rows, hidden)), nn.Parameter(torch.empty(hidden, wide))
        self.gate_up = nn.Parameter(torch.empty(2 * shape.feed_forward, hidden))
        self.down = nn.Parameter(torch.empty(hidden, shape.feed_forward))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], model: Decoder, number: int, cache: Cache | None
    ) -> Tensor:
        b, s, _ = x.shape
        shape = model.shape
        qkv = (
            model.times(model.normed(x, self.norm_in), self.qkv)
            .view(b, s, -1, shape.head_size)
            .transpose(1, 2)
        )
        q, k, v = qkv.split((shape.heads, shape.groups, shape.groups), 1)
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        if cache is None:
            k, v = (each.repeat_interleave(shape.heads // shape.groups, 1) for each in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attended(number, q, k, v)
        x = x + model.times(y.transpose(1, 2).reshape(b, s, -1), self.out).float()
        gate, up = model.times(model.normed(x, self.norm_mid), self.gate_up).chunk(2, -1)
        return x + model.times(F.silu(gate) * up, self.down).float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Cache:
    """Keys and values of up to `length` tokens, with padding [b] at the left of each row.

    Positions start at the left end: rotary embeddings depend on distances alone.
    """

    def __init__(self, model: Decoder, padding: Tensor, length: int) -> None:
        shape = model.shape
        size = (len(padding), shape.groups, length, shape.head_size)
        self._pairs = [
            tuple(torch.zeros(size, dtype=model.compute, device=padding.device) for _ in range(2))
            for _ in model.layers
        ]
        self._padding = padding
        self.filled = 0

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, heads, s, head size], k and v [b, groups, s, head size] -> [b, heads, s, head size]."""
        (b, heads, s, size), groups = q.shape, k.shape[1]
        first, last = self.filled, self.filled + s
        keys, values = (each[:, :, :last] for each in self._pairs[layer])
        keys[:, :, first:], values[:, :, first:] = k, v
        places = torch.arange(last, device=q.device)
        own = places[first:, None]
        # Padding attends to itself: a softmax over nothing would be NaN.
        seen = ((places >= self._padding.view(-1, 1, 1)) & (places <= own)) | (places == own)  # [b, s, last]
        # The queries of a group share its keys, which would otherwise be copied for each head.
        grouped = q.reshape(b, groups, heads // groups * s, size)
        scores = (grouped @ keys.transpose(2, 3)).view(b, heads, s, last).float() * size**-0.5
        shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(v.dtype)
        return (shares.view(b, groups, -1, last) @ values).view(b, heads, s, size)

    def keep(self, rows: Tensor) -> None:
        self._pairs = [(k[rows], v[rows]) for k, v in self._pairs]
        self._padding = self._padding[rows]


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    length: int,
    end: int,
    chances: Tensor | None = None,
    together: int = 256,
) -> list[list[int]]:
    """The tokens after each prompt, up to `end` or `length` of them.

    Takes the most probable tokens, or samples with chances, float [prompts, length] within 0..1. together: rows that
    are generated at the same time.
    """
    found: list[list[int]] = []
    for first in range(0, len(prompts), together):
        part = slice(first, first + together)
        found += _generated(model, prompts[part], length, end, None if chances is None else chances[part])
    return found


def _generated(
    model: Decoder, prompts: Sequence[Sequence[int]], length: int, end: int, chances: Tensor | None
) -> list[list[int]]:
    longest, device = max(map(len, prompts)), model.device
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    step = torch.tensor([[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    chances = None if chances is None else chances.to(device)
    cache = Cache(model, padding, longest + length)
    found = torch.full((len(prompts), length), PAD, device=device)
    counts = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts), device=device)  # those in the cache
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for place in range(length):
        logits = model.logits(model(step, cache)[:, -1])
        taken = logits.argmax(-1) if chances is None else _sampled(logits, chances[rows, place])
        found[rows, place] = torch.where(ended, PAD, taken)
        counts[rows] += ~ended
        ended = ended | (taken == end)
        left = int((~ended).sum())
        if not left:
            break
        if left <= 0.75 * len(rows):
            kept = (~ended).nonzero()[:, 0]
            cache.keep(kept)
            rows, taken, ended = rows[kept], taken[kept], ended[kept]
        step = taken[:, None]
    return [row[:count] for row, count in zip(found.tolist(), counts.tolist(), strict=True)]


def _sampled(logits: Tensor, chances: Tensor) -> Tensor:
    reached = logits.float().softmax(-1).cumsum(-1) < chances[:, None]
    return reached.sum(-1).clamp(max=logits.shape[-1] - 1)
