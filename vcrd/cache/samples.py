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
from vcrd.link.question import Question

KINDS = (".jsonl", ".npy", ".safetensors")
FIELD = "tokens"
_ROWS = 1024  # of an array, read at once


class Sample(NamedTuple):
    """where: the place in the file, for messages. tokens: int64 [s]."""

    where: str
    tokens: np.ndarray


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
            yield Question(torch.from_numpy(np.stack(group)))


def _grouped(samples: Iterator[np.ndarray], batch: int) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    for tokens in samples:
        if group and (len(group) == batch or len(tokens) != len(group[0])):
            yield group
            group = []
        group.append(tokens)
    if group:
        yield group


def _checked(path: Path, vocab_size: int, sequence_length: int) -> Iterator[np.ndarray]:
    for where, tokens in samples_of(path):
        if not 0 < len(tokens) <= sequence_length:
            what = f"1 to {sequence_length} tokens (sequence_length)"
            raise expected(f"{path}, {where}", what, len(tokens), OptionError)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise expected(
                f"{path}, {where}", f"token ids in [0, {vocab_size})", f"{low} to {high}", OptionError
            )
        yield tokens


def samples_of(path: Path) -> Iterator[Sample]:
    """The samples of a file in order. OptionError for a file that holds none.

    .jsonl: each line is an object with a list "tokens". .npy: an array of integers [n, s]. .safetensors: such a tensor
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
                yield Sample(f"line {number}", _tokens_of(line, path, number))


def _tokens_of(line: bytes, path: Path, number: int) -> np.ndarray:
    try:
        found = json.loads(line)[FIELD]
        # A list of equal types alone: numpy would take true for 1, and 1.5 for a float.
        right = isinstance(found, list) and all(type(token) is int for token in found)
        tokens = np.array(found, dtype=np.int64) if right else None
    except (ValueError, TypeError, KeyError, OverflowError):
        tokens = None
    if tokens is None or tokens.ndim != 1:
        raise expected(
            f"{path}, line {number}", f'{{"{FIELD}": [..]}} with integers', f"{line[:80]!r}", OptionError
        )
    return tokens


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
