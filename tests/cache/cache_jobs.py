"""Made-up answers for tests of a cache, and processes that write them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from vcrd.cache.files import Cache, CacheHeader, CacheWriter, key_of
from vcrd.link.handshake import Head, Tokenizer
from vcrd.link.plan import Shard, Span

VOCABULARY = 37
TOKENIZER = Tokenizer("WordTokenizer", VOCABULARY, "c" * 64)
COMMON = {"vocab_size": VOCABULARY, "weights": "ab12", "checkpoint": "a teacher", "tokenizer": TOKENIZER}
HEADERS = {
    "float16": CacheHeader("float16", **COMMON),
    "float32": CacheHeader("float32", **COMMON),
    "logits_8bit": CacheHeader("logits_8bit", **COMMON),
    "topk": CacheHeader("topk", top_k=3, **COMMON),
    "hidden": CacheHeader("hidden", head=Head(5, "bfloat16", 0.5, 30.0), **COMMON),
}
SMALL = HEADERS["float16"]


def tokens_of(number: int) -> Tensor:
    return torch.arange(3 + number % 5) + 10 * number


def key(number: int) -> bytes:
    return key_of(tokens_of(number))


def random_bits(tensor: Tensor, seed: int) -> Tensor:
    """The tensor with other bits, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    bits = tensor.reshape(-1).view(torch.uint8)
    bits.copy_(torch.randint(0, 256, bits.shape, dtype=torch.uint8, generator=generator))
    return tensor


def answer(header: CacheHeader, number: int) -> list[Tensor]:
    """The answer to `tokens_of(number)`, any bits: all rows and columns."""
    blank = header.content().blank(len(tokens_of(number)), 1, header.vocab_size)
    return [random_bits(tensor, 1000 * number + slot).squeeze(1) for slot, tensor in enumerate(blank)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether the bits are equal."""
    return len(a) == len(b) and all(map(_equal_bits, a, b))


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)


def _bits(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor)
    return flat.view(torch.uint8).numpy().tobytes()


def add(writer: CacheWriter, number: int) -> None:
    tensors = answer(writer.header, number)
    rows = len(tensors[0])
    writer.add(key(number), tensors, Span(0, rows), rows, Shard(0, writer.header.vocab_size))


def read(cache: Cache, number: int) -> list[Tensor]:
    """The answer to `tokens_of(number)` that the cache has."""
    rows = len(tokens_of(number))
    out = [t.squeeze(1) for t in cache.header.content().blank(rows, 1, cache.header.vocab_size)]
    cache.read(key(number), [Span(0, rows)], Shard(0, cache.header.vocab_size), out)
    return out


def fill(folder: Path, numbers: range, per_file: int = 1) -> None:
    """Adds what is not there yet."""
    with CacheWriter(folder, SMALL) as writer:
        cache = Cache(folder, SMALL)
        for count, number in enumerate(numbers, 1):
            if key(number) not in cache:
                add(writer, number)
            if count % per_file == 0:
                writer.flush()


def fill_and_be_killed(folder: Path, step: str) -> None:
    """Adds the answer 0, and then is killed at that step of writing the answer 1."""

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    with CacheWriter(folder, SMALL) as writer:
        add(writer, 0)
        writer.flush()
        add(writer, 1)
        if step == "half":

            class Half:
                def __init__(self, *arguments) -> None:
                    self.file = open(*arguments)

                def __enter__(self):
                    return self

                def __exit__(self, *_) -> None:
                    pass

                def write(self, data) -> None:
                    self.file.write(memoryview(data)[: len(data) // 2])
                    self.file.flush()
                    kill()

            with mock.patch("vcrd.cache.atomic.open", Half, create=True):
                writer.flush()
        elif step == "renamed":
            with mock.patch("vcrd.cache.atomic._synchronise", kill):
                writer.flush()
        else:
            with mock.patch(f"os.{step}", kill):
                writer.flush()
