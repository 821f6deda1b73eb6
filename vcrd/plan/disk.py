"""The price of a cache: the answers of the teacher on disk, and a step that reads them (docs/cache.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vcrd.link.payload import PAYLOADS, Payload
from vcrd.plan.costs import student_step_seconds, teacher_gpu_seconds
from vcrd.plan.scenario import Scenario

# Constants of vcrd.cache, which is not imported here. A test compares the plan with files.
INDEX_BYTES = 56  # of each piece: its key and its rows
HEADER_BYTES = 1024  # at most, of each file
FILE_BYTES = 256 << 20  # vcrd.cache.fill: a file is written when the answers have this size


@dataclass(frozen=True)
class Stored:
    """The price of one payload on disk, filled over the link: one writer for all columns of a sequence.

    token_bytes: contents per token. sequence_bytes: a whole sequence with its index. files: of one writer. total_bytes:
    all files, with the output layer of "hidden"; each file counts `HEADER_BYTES`, which is at most a kilobyte too much.
    step_bytes: that a step of all data ranks reads, each answer once: ranks of a node read it from one page cache.
    read_seconds: of that, at the speed of the disk. step_seconds: of a step whose answers are there. fill_gpu_seconds:
    of the teacher, for all answers.
    """

    payload: str
    token_bytes: int
    sequence_bytes: int
    files: int
    total_bytes: int
    step_bytes: int
    read_seconds: float
    step_seconds: float
    fill_gpu_seconds: float

    @property
    def disk_share(self) -> float:
        """Share of the step in which the disk is read. Above 1 the student waits for it."""
        return self.read_seconds / self.step_seconds


def stored(scenario: Scenario) -> tuple[Stored, ...]:
    """The price of every payload for `cache_tokens`, in the order of `payload.PAYLOADS`."""
    return tuple(_stored(scenario, payload) for payload in PAYLOADS)


def _stored(scenario: Scenario, payload: Payload) -> Stored:
    payload = payload.sized(top_k=scenario.top_k, state_size=scenario.teacher.hidden)
    token = payload.bytes(1, scenario.vocab)
    contents = token * scenario.sequence
    sequences = math.ceil(scenario.cache_tokens / scenario.sequence)
    files = math.ceil(sequences / math.ceil(FILE_BYTES / contents))
    total = sequences * (contents + INDEX_BYTES) + files * HEADER_BYTES
    if payload.name == "hidden":  # a row per column, as wide as a state
        total += payload.bytes(scenario.vocab, 0) + INDEX_BYTES + HEADER_BYTES
    step_bytes = token * scenario.tokens * scenario.micro_batches * scenario.student_data
    return Stored(
        payload=payload.name,
        token_bytes=token,
        sequence_bytes=contents + INDEX_BYTES,
        files=files + (payload.name == "hidden"),
        total_bytes=total,
        step_bytes=step_bytes,
        read_seconds=step_bytes / scenario.disk,
        step_seconds=student_step_seconds(scenario, payload),
        fill_gpu_seconds=teacher_gpu_seconds(scenario, payload.name)
        / scenario.tokens
        * scenario.cache_tokens,
    )
