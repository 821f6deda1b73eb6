"""Measures a student that takes its teacher's answers from a cache.

    python benchmarks/cache.py [--payload float16] [--vocab 131072] [--tokens 512] [--threads 1] [--folder /tmp/x]

Writes a cache, and reads it from the warm page cache: GB per second through `CachedAnswers`, beside copies of as many
bytes from memory to memory in the same process. Then it takes training steps of a small student whose answers come from
the cache, and of the same student with ready answers in memory, in alternating blocks of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import torch
from torch import Tensor

import vcrd
from machine import processor
from vcrd.cache.answers import CachedAnswers
from vcrd.cache.files import CacheHeader, CacheWriter, key_of
from vcrd.link import Head, LinkSettings
from vcrd.link.buffers import HostMemory
from vcrd.link.plan import Shard, Span
from vcrd.settings import TeacherSource
from vcrd.teacher_logits import TeacherLogits

CREDITS = 2
SEQUENCES = 6  # distinct micro-batches
STATE_SIZE = 4096  # of hidden states


@dataclass
class Bench:
    """A cache with a few micro-batches of one sequence each, and what a student needs to know of it."""

    folder: Path
    payload: str
    vocab: int
    tokens: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        head = Head(STATE_SIZE, "bfloat16") if self.payload == "hidden" else None
        self.header = CacheHeader(self.payload, self.vocab, 64 if self.payload == "topk" else 0, head)
        self.batches = [
            torch.randint(self.vocab, (1, self.tokens), generator=generator) for _ in range(SEQUENCES)
        ]
        with CacheWriter(self.folder, self.header) as writer:
            for tokens in self.batches:
                whole = Span(0, self.tokens)
                writer.add(
                    key_of(tokens[0]), self._answer(generator), whole, self.tokens, Shard(0, self.vocab)
                )
            if head:
                writer.add_head(
                    torch.zeros(self.vocab, STATE_SIZE, dtype=torch.bfloat16), Shard(0, self.vocab)
                )

    def _answer(self, generator: torch.Generator) -> list[Tensor]:
        """Any values that are right for the payload; their content costs the same time."""
        blank = [tensor.squeeze(1) for tensor in self.header.content().blank(self.tokens, 1, self.vocab)]
        if self.payload == "logits_8bit":
            return [blank[0].random_(0, 256, generator=generator)]
        if self.payload == "topk":
            ids = torch.randperm(self.vocab, generator=generator)[:64].expand(self.tokens, 64)
            logprobs = torch.randn(self.tokens, 64, generator=generator).log_softmax(-1) - 0.1
            return [logprobs, ids.int(), torch.full((self.tokens,), -2.35)]
        return [torch.randn(blank[0].shape, generator=generator).to(blank[0].dtype)]

    def open(self) -> CachedAnswers:
        settings = LinkSettings(
            teacher=f"cache:{self.folder}", payload=self.payload, top_k=64, credits=CREDITS, timeout=600
        )
        return CachedAnswers.connect(
            settings,
            TeacherSource("", None, str(self.folder)),
            vocab_size=self.vocab,
            padded_vocab_size=self.vocab,
            sequence_length=self.tokens,
            tensor_rank=0,
            tensor_size=1,
            data_rank=0,
            data_size=1,
        )


class Asking:
    """Answers from a cache, asked for as far ahead as the plug asks."""

    def __init__(self, bench: Bench) -> None:
        self._answers = bench.open()
        self._bench = bench
        self._asked = self._taken = 0

    def ahead(self) -> None:
        """Asks ahead, and waits until that is read."""
        while self._asked < self._taken + CREDITS:
            self._ask()
        while not self._answers._reading.is_ready(self._asked - 1):
            time.sleep(0.001)

    def _ask(self) -> None:
        self._answers.request(self._bench.batches[self._asked % SEQUENCES])
        self._asked += 1

    def __call__(self) -> TeacherLogits:
        self._ask()  # the next micro-batch is asked for when this one is drawn
        self._taken += 1
        return self._answers.receive(self._taken - 1)

    def close(self) -> None:
        self._answers.close()


def reading_speed(bench: Bench, repeats: int) -> dict[str, float]:
    """Median GB/s over `repeats` passes: answers from the cache, and copies from memory to memory of the same kind."""
    asking, memory, rates, copies = Asking(bench), HostMemory(torch.device("cpu"), CREDITS + 1), [], []
    sources = [[tensor.clone() for tensor in _tensors(asking())] for _ in range(SEQUENCES)]
    size = sum(tensor.nbytes for each in sources for tensor in each)
    asking.ahead()
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(SEQUENCES):
            asking()
        asking.ahead()  # as many were read as were taken
        rates.append(size / (time.perf_counter() - begun) / 1e9)
        begun = time.perf_counter()
        for each in sources:
            for tensor in each:
                memory.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
        copies.append(size / (time.perf_counter() - begun) / 1e9)
    asking.close()
    return {
        "bytes_per_token": size / SEQUENCES / bench.tokens,
        "cache_gb_per_s": statistics.median(rates),
        "copy_gb_per_s": statistics.median(copies),
    }


def _tensors(answer: TeacherLogits) -> list[Tensor]:
    """The tensors that an answer brings; the output layer is not one of them."""
    return [
        value
        for field in fields(answer)
        if isinstance(value := getattr(answer, field.name), Tensor) and field.name != "weight"
    ]


class Student:
    """A small model, with the loss and the gradient of a training step."""

    def __init__(self, vocab: int, hidden: int) -> None:
        torch.manual_seed(2)
        self._embedding = torch.nn.Embedding(vocab, hidden)
        self._layers = torch.nn.Sequential(
            torch.nn.Linear(hidden, 4 * hidden), torch.nn.GELU(), torch.nn.Linear(4 * hidden, hidden)
        )
        self._head = torch.nn.Linear(hidden, vocab, bias=False)

    def step(self, tokens: Tensor, answer: Callable[[], TeacherLogits]) -> tuple[float, float]:
        """Seconds of one step with the answer: of the clock, and of all processors together."""
        begun = time.perf_counter(), time.process_time()
        logits = self._head(self._layers(self._embedding(tokens.T)))
        out = vcrd.validity_calibrated_kl(logits, answer(), tokens.T, inplace_gradient=True)
        out.loss.mean().backward()
        return time.perf_counter() - begun[0], time.process_time() - begun[1]


def step_time(bench: Bench, hidden: int, blocks: int, steps: int) -> dict[str, float]:
    """Median seconds of a step with answers from the cache and with ready answers, in alternating blocks; the ratio of
    these medians, and that of processor time, which other processes on the machine disturb less."""
    student, asking = Student(bench.vocab, hidden), Asking(bench)
    ready = asking()
    cached, plain, ratios = [], [], []
    for block in range(blocks + 1):
        asking.ahead()  # as in the middle of a run; nothing is read while the other student takes its steps
        mine = [student.step(bench.batches[0], asking) for _ in range(steps)]
        asking.ahead()
        other = [student.step(bench.batches[0], lambda: ready) for _ in range(steps)]
        if block:  # the first block warms up
            cached += mine
            plain += other
            ratios.append(_ratio(mine, other, 0))
    asking.close()
    return {
        "cached_s": statistics.median(clock for clock, _ in cached),
        "ready_s": statistics.median(clock for clock, _ in plain),
        "ratio": _ratio(cached, plain, 0),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "processor_ratio": _ratio(cached, plain, 1),
    }


def _ratio(some: list[tuple[float, float]], others: list[tuple[float, float]], which: int) -> float:
    return statistics.median(each[which] for each in some) / statistics.median(each[which] for each in others)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    payloads = ("float16", "float32", "logits_8bit", "topk", "hidden")
    parser.add_argument("--payload", choices=payloads, nargs="+", default=["float16", "logits_8bit"])
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--hidden", type=int, default=512, help="size of the student")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="passes over the cache")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="in a block; 0 measures reading alone")
    parser.add_argument("--folder", type=Path, help="where the cache is written; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}")
    results = {}
    for payload in options.payload:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = Bench(Path(folder), payload, options.vocab, options.tokens)
            found = results[payload] = reading_speed(bench, options.repeats)
            print(
                f"{payload}: {found['bytes_per_token']:,.0f} bytes per token, read {found['cache_gb_per_s']:.2f} GB/s, "
                f"copied in memory {found['copy_gb_per_s']:.2f} GB/s"
            )
            if options.steps:
                found |= step_time(bench, options.hidden, options.blocks, options.steps)
                print(
                    f"{payload}: a step takes {found['cached_s'] * 1e3:.1f} ms with the cache, "
                    f"{found['ready_s'] * 1e3:.1f} ms with ready answers: {found['ratio']:.3f} times "
                    f"(blocks {found['least_ratio']:.3f} to {found['largest_ratio']:.3f}; processor time "
                    f"{found['processor_ratio']:.3f} times)",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
