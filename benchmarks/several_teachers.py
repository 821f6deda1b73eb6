"""What a micro-batch costs whose samples have different teachers: putting answers together, and the loss.

    python benchmarks/several_teachers.py --sequence 512 --batch 4 --vocabulary 32000

Times of forward and backward of the loss from bf16 logits, with answers that are there already. "copy" is the part that
puts the answers of several teachers into one. The smallest of several runs counts, since other work can only slow it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from vcrd.link.payload import encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard
from vcrd.link.question import Question
from vcrd.link.student import Waits
from vcrd.loss.api import validity_calibrated_kl
from vcrd.megatron.teachers import Answer, Teachers
from vcrd.settings import LinkSettings
from vcrd.teacher_logits import DenseLogits, HiddenStates, TeacherLogits, TopKLogits

HIDDEN = 1024


class Ready:
    """A teacher whose answer to `rows` samples is there already."""

    def __init__(self, payload: str, sequence: int, rows: int, vocabulary: int, device: str) -> None:
        self.waits, self.served_by, self.bytes_received, self.tokenizer = Waits(), (0, 1), 0, None
        self._answer = made(payload, sequence, rows, vocabulary, device)

    def request(self, *_: object) -> int:
        return 0

    def receive(self, number: int) -> TeacherLogits:
        return self._answer


def made(payload: str, sequence: int, rows: int, vocabulary: int, device: str) -> TeacherLogits:
    if payload == "hidden":
        states = torch.randn(sequence, rows, HIDDEN, device=device).bfloat16()
        return HiddenStates(states, torch.randn(vocabulary, HIDDEN, device=device).bfloat16())
    logits = torch.randn(sequence, rows, vocabulary, device=device)
    if payload == "topk":
        return TopKLogits(*top_k_of(logits, 64, Shard(0, vocabulary), None))
    return DenseLogits(encode(payload_named(payload), logits, row_max(logits)))


def best(run: Callable[[], object], repeats: int, device: str) -> float:
    """Milliseconds of the fastest of some runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("sequence", 512), ("batch", 4), ("vocabulary", 32000), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequence, batch, vocabulary = options.sequence, options.batch, options.vocabulary
    student = torch.randn(sequence, batch, vocabulary, device=device).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (sequence, batch), device=device)
    mask = torch.ones(sequence, batch, device=device)
    place = SimpleNamespace(tensor_size=1, context_size=1, device=torch.device(device))
    tokens = torch.zeros(batch, sequence, dtype=torch.long)

    def loss(answer: Answer) -> None:
        student.grad = None
        out = answer.loss(validity_calibrated_kl, student, labels, mask=mask)
        out.loss.sum().backward()

    print(f"{device}, [{sequence}, {batch}, {vocabulary}], milliseconds")
    print("| teachers of the samples | copy | loss |\n|---|---|---|")
    for payloads in (
        ["float16"],
        ["float16", "float16"],
        ["topk"],
        ["topk", "topk"],
        ["topk", "float16"],
        ["hidden"],
        ["hidden", "hidden"],
    ):
        names = [f"t{n}" for n in range(len(payloads))]
        address = ",".join(f"{name}=h:{n}" for n, name in enumerate(names, 1))
        owners = tuple(row % len(names) for row in range(batch))
        sources = {
            name: Ready(payload, sequence, owners.count(n), vocabulary, device)
            for n, (name, payload) in enumerate(zip(names, payloads, strict=True))
        }
        teachers = Teachers(sources, place, LinkSettings(address=address))
        kept: list[Answer] = []

        def receive(teachers: Teachers = teachers, kept: list[Answer] = kept, owners: tuple = owners) -> None:
            kept[:] = [teachers.receive(teachers.request(Question(tokens, teachers=owners)))]

        copied = best(receive, options.repeats, device)
        lost = best(lambda kept=kept: loss(kept[0]), options.repeats, device)
        print(f"| {', '.join(payloads)} | {copied:.1f} | {lost:.1f} |", flush=True)


if __name__ == "__main__":
    main()
