"""Samples of token ids in a file, as the questions that a teacher is asked about them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vcrd.errors import OptionError, expected
from vcrd.link.question import Context, Question

KINDS = (".jsonl", ".npy", ".safetensors")
FIELD = "tokens"
CONTEXT, POSITIONS = "vcrd_teacher_context", "vcrd_teacher_context_positions"  # as in a micro-batch
_NONE = np.empty(0, np.int64)
_ROWS = 1024  # of an array, read at once


class Sample(NamedTuple):
    """where: the place in the file, for messages. tokens: int64 [s]. context: int64 [c], what the teacher alone sees.
    positions: int64 [c], the index in `tokens` before which it sees each of them."""

    where: str
    tokens: np.ndarray
    context: np.ndarray = _NONE
    positions: np.ndarray = _NONE


def questions_of(
    path: Path, batch: int, vocab_size: int, sequence_length: int, rank: int = 0, size: int = 1
) -> Iterator[Question]:
    """The micro-batches of a file: up to `batch` consecutive samples of one length. Rank r of `size` gets every
    micro-batch whose number is r modulo `size`.

    The micro-batches depend on the file and on `batch` alone, so that a fill which is resumed by another number of
    ranks asks the same questions. OptionError that names the sample if it is no list of ids in [0, vocab_size), or is
    longer than `sequence_length`.
    """
    groups = enumerate(_grouped(_checked(path, vocab_size, sequence_length), batch))
    for number, group in groups:
        if number % size == rank:
            yield _question(group)


def _question(group: list[Sample]) -> Question:
    tokens = np.stack([sample.tokens for sample in group])
    context = np.concatenate([sample.context for sample in group])
    places = [row * tokens.shape[1] + sample.positions for row, sample in enumerate(group)]
    seen = Context(torch.from_numpy(context), torch.from_numpy(np.concatenate(places)))
    return Question(torch.from_numpy(tokens), context=seen)


def _grouped(samples: Iterator[Sample], batch: int) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in samples:
        if group and (len(group) == batch or len(sample.tokens) != len(group[0].tokens)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _checked(path: Path, vocab_size: int, sequence_length: int) -> Iterator[Sample]:
    for sample in samples_of(path):
        where, (_, tokens, context, positions) = f"{path}, {sample.where}", sample
        if not 0 < len(tokens) <= sequence_length:
            raise expected(
                where, f"1 to {sequence_length} tokens (sequence_length)", len(tokens), OptionError
            )
        for ids in (tokens, context):
            low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
            if low < 0 or high >= vocab_size:
                raise expected(where, f"token ids in [0, {vocab_size})", f"{low} to {high}", OptionError)
        if len(positions) != len(context):
            got = f"{len(positions)} for {len(context)}"
            raise expected(
                f"{where}, {POSITIONS}", "a position of each token of the context", got, OptionError
            )
        if (np.diff([0, *positions, len(tokens) - 1]) < 0).any():
            what = f"positions in [0, {len(tokens)}) that do not descend"
            raise expected(f"{where}, {POSITIONS}", what, positions[:16].tolist(), OptionError)
        yield sample


def samples_of(path: Path) -> Iterator[Sample]:
    """The samples of a file in order. OptionError for a file that holds none.

    .jsonl: each line is an object with a list "tokens", and maybe lists "vcrd_teacher_context" and
    "vcrd_teacher_context_positions". .npy: an array of integers [n, s]. .safetensors: such a tensor
    with the name "tokens". An array is mapped and never read as a whole.
    """
    if path.suffix not in KINDS:
        raise expected("--data", f"a file {', '.join(KINDS)}", str(path), OptionError)
    try:
        yield from _lines(path) if path.suffix == ".jsonl" else _rows(path)
    except OSError as error:
        raise expected(
            "--data", "a file that can be read", f"{path}: {error.strerror}", OptionError
        ) from None


def _lines(path: Path) -> Iterator[Sample]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _sample(line, path, number)


def _sample(line: bytes, path: Path, number: int) -> Sample:
    try:
        found = json.loads(line)
        tokens, context = (_integers(found.get(name, [])) for name in (FIELD, CONTEXT))
        positions = _integers(found[POSITIONS]) if POSITIONS in found else np.zeros_like(context)
        return Sample(f"line {number}", tokens, context, positions)
    except (ValueError, TypeError, AttributeError, OverflowError):
        what = f'{{"{FIELD}": [..]}} with integers'
        raise expected(f"{path}, line {number}", what, f"{line[:80]!r}", OptionError) from None


def _integers(found: Any) -> np.ndarray:
    # A list of equal types alone: numpy would take true for 1, and 1.5 for a float.
    if not isinstance(found, list) or any(type(each) is not int for each in found):
        raise TypeError
    return np.array(found, dtype=np.int64)


def _rows(path: Path) -> Iterator[Sample]:
    with contextlib.ExitStack() as opened:
        array, shape, dtype = _array(path, opened)
        if len(shape) != 2 or not dtype.upper().startswith(("I", "U")):
            raise expected(str(path), "an array of integers [n, s]", f"{dtype} {list(shape)}", OptionError)
        for first in range(0, shape[0], _ROWS):
            last = min(first + _ROWS, shape[0])
            for row, tokens in enumerate(array[first:last].astype(np.int64), first):
                yield Sample(f"row {row}", tokens)


def _array(path: Path, opened: contextlib.ExitStack) -> tuple[Any, Sequence[int], str]:
    """What slices to arrays, its shape, and the name of its dtype."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise expected(str(path), "an array of numpy", str(error), OptionError) from None
        return array, array.shape, str(array.dtype)
    from safetensors import SafetensorError, safe_open

    try:
        file = opened.enter_context(safe_open(path, "np"))
        array = file.get_slice(FIELD)
    except SafetensorError as error:
        raise expected(str(path), f"safetensors with {FIELD!r}", str(error), OptionError) from None
    return array, array.get_shape(), array.get_dtype()
