"""The files of a cache: a writer for any number of processes side by side, and a reader of what is there.

A folder has one `header.json` (`CacheHeader`) and files `answers-*.safetensors`. A file holds pieces of answers, each
with some rows (positions) of one sequence, and with the columns of one shard of the vocabulary:

    keys      uint8 [pieces, 32]     `key_of` the sequence
    rows      int64 [pieces, 3]      first and last + 1 row of the piece, and how many rows the whole answer has
    contents  one after another, in the order of `keys`: `logits` [all rows, columns], or `logprobs`, `ids`
              [all rows, k] and `log_tail` [all rows], or `states` [all rows, size]

and in its metadata: `header`, the digest of header.json; `run`; `columns`, the first and the last + 1; `digest`, the
SHA-256 of all else in the file. An answer is there when pieces of one run cover all of its rows and columns. The output
layer of the teacher, for the payload "hidden", is an entry as well: its rows are the columns of the vocabulary.

A file is written under a temporary name, synchronised, and renamed. It is never changed afterwards. So a reader sees
whole files only, whenever a writer is killed, and needs no lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vcrd.cache import atomic
from vcrd.cache.answer_file import AnswerFile, Contents, write_answers
from vcrd.cache.header import KEY_BYTES, CacheError, CacheHeader, key_of
from vcrd.errors import check_integer, expected
from vcrd.link.plan import Shard, Span

__all__ = ["Cache", "CacheError", "CacheHeader", "CacheWriter", "key_of"]

HEADER = "header.json"
_MOST_MAPPED = 128  # files; each keeps a descriptor, of which a process may have as few as 1024
OUTPUT_LAYER = bytes(KEY_BYTES)  # the key of the output layer


def open_header(folder: str | os.PathLike, wanted: CacheHeader | None = None) -> tuple[CacheHeader, str]:
    """The header of a cache and the digest of its text. CacheError without one, or if it is not the wanted one."""
    path = Path(folder) / HEADER
    try:
        text = path.read_text()
    except OSError as error:
        what = f"a folder with {HEADER}, which `python -m vcrd cache` writes"
        raise expected("cache", what, f"{os.fspath(folder)!r} ({error.strerror})", CacheError) from error
    try:
        header = CacheHeader.read(text)
        header.content()
    except (TypeError, ValueError) as error:
        raise expected(os.fspath(path), "the header of a cache", f"one with {error}", CacheError) from error
    _compare(folder, header, wanted, exact=False)
    return header, atomic.digest_of(text.encode())


def _compare(folder: str | os.PathLike, header: CacheHeader, wanted: CacheHeader | None, exact: bool) -> None:
    reasons = [] if wanted is None else header.differences(wanted, exact)
    if reasons:
        raise CacheError(f"the cache {os.fspath(folder)} is refused: " + "; ".join(reasons))


class CacheWriter:
    """Adds answers to a cache. For one thread; any number of writers may add to one folder at the same time.

    folder: created if missing. header: of these answers. The first writer of a folder writes it; to all others it must
    be equal, or CacheError says where it is not. limit_bytes: a file is written when the pieces of the writer have this
    size; until then they are in memory. run: a name that all ranks have in common that write pieces of the same
    answers, and that is another one whenever they start again: an answer is never put together from two runs, which
    may differ in rounding. It may stay empty where each rank writes whole answers.

    CacheError where a file cannot be written, as on a full disk. Then the pieces of that file are gone, nothing of them
    is on disk, and the writer may be used further: its memory stays bounded.
    """

    def __init__(
        self, folder: str | os.PathLike, header: CacheHeader, limit_bytes: int = 256 << 20, run: str = ""
    ) -> None:
        check_integer("limit_bytes", limit_bytes, 1)
        self.folder, self.header, self.run = Path(folder), header, run
        self._payload, self._limit = header.content(), limit_bytes
        self._pending: dict[tuple[int, int], dict[tuple[bytes, Span], _Pending]] = {}
        self._bytes = 0
        self._names = atomic.Names("answers", ".safetensors")
        with atomic.writing(f"the cache {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.remove_abandoned(self.folder)
            if not (self.folder / HEADER).exists():
                atomic.create(self.folder, HEADER, header.text().encode())
        self.header, self._header_digest = open_header(self.folder)
        _compare(self.folder, self.header, header, exact=True)

    def add(self, key: bytes, tensors: Sequence[Tensor], rows: Span, of_rows: int, columns: Shard) -> None:
        """Adds one piece: copies the tensors, from any device, and may write a file.

        tensors: as `Payload.blank` has them, without the batch dimension: [rows.width, ...]. rows: their positions in
        the sequence, which has `of_rows`. columns: their columns of the vocabulary; not read where the payload does not
        depend on columns. A piece without rows or columns is nothing. ValueError for tensors that do not fit.
        """
        if len(key) != KEY_BYTES:
            raise expected("key", f"{KEY_BYTES} bytes", len(key))
        vocabulary = self.header.vocab_size
        if self._payload.whole:
            columns = Shard(0, vocabulary)
        if not 0 <= rows.start <= rows.stop <= of_rows:
            raise expected("rows", f"a span within [0, {of_rows})", rows)
        if not 0 <= columns.start <= columns.stop <= vocabulary:
            raise expected("columns", f"a span within [0, {vocabulary})", columns)
        check_tensors("tensors", tensors, self._payload, rows.width, columns.width)
        if not rows.width or not columns.width:
            return
        pending = self._pending.setdefault((columns.start, columns.stop), {})
        place = key, Span(rows.start, rows.stop)
        if place in pending:
            return
        copies = [torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for t in tensors]
        pending[place] = _Pending(of_rows, copies)
        self._bytes += sum(t.nbytes for t in copies)
        if self._bytes >= self._limit:
            self.flush()

    def add_head(self, weight: Tensor, columns: Shard) -> None:
        """Adds rows of the output layer, [columns.width, size] in the dtype of the header's head; for "hidden" only."""
        if self.header.head is None:
            raise expected("head", f"none with the payload {self.header.payload!r}", "an output layer")
        self.add(OUTPUT_LAYER, [weight], Span(columns.start, columns.stop), self.header.vocab_size, columns)

    def flush(self) -> None:
        """Writes what is in memory: one file for each shard of columns."""
        while self._pending:
            columns, pieces = self._pending.popitem()
            self._bytes -= sum(t.nbytes for piece in pieces.values() for t in piece.tensors)
            contents = Contents(
                keys=[key for key, _ in pieces],
                rows=[(rows.start, rows.stop, piece.of_rows) for (_, rows), piece in pieces.items()],
                tensors=[piece.tensors for piece in pieces.values()],
                columns=Shard(*columns),
                run=self.run,
            )
            write_answers(self.folder, self._names.next(), contents, self._payload, self._header_digest)

    def close(self) -> None:
        """Writes what is in memory. The writer may be closed more than once."""
        self.flush()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Pending(NamedTuple):
    of_rows: int
    tensors: list[Tensor]


class Sizes(NamedTuple):
    """What a cache holds. entries: answers that are there as a whole; tokens: their rows. bytes, files: everything, so
    also pieces that are there twice. incomplete: answers of which only a part is there.
    """

    entries: int
    tokens: int
    bytes: int
    files: int
    incomplete: int

    def __str__(self) -> str:
        entries = "1 entry" if self.entries == 1 else f"{self.entries:,} entries"
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        incomplete = f" (and parts of {self.incomplete:,} more)" if self.incomplete else ""
        return f"{entries}{incomplete}, {self.tokens:,} tokens, {self.bytes:,} bytes in {files}"


class Cache:
    """The answers that are in a folder when it is opened, and after each `refresh`. Its methods use no collective.

    header: what the reader knows about the answers that it needs; CacheError says where the cache is another one. None
    takes any. names: of the files to open, in this order; None: all. files: those that have been opened. Several
    threads may use a cache at the same time.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        header: CacheHeader | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.header, self._header_digest = open_header(folder, header)
        self._payload = self.header.content()
        self.files: list[AnswerFile] = []
        self._mapped = lru_cache(_MOST_MAPPED)(AnswerFile.mapped)
        self._seen: set[str] = set()
        # Of each key its pieces: the number of the file times 2^32, plus the number of the piece in the file.
        self._pieces: dict[bytes, tuple[int, ...]] = {}
        self._refreshing = threading.Lock()
        self.refresh(names)

    def refresh(self, names: Sequence[str] | None = None) -> int:
        """Looks for files that are new in the folder, and returns how many there are. CacheError for a damaged one.

        names: the files to open instead, in this order. FileNotFoundError if one of them is not there; then none is
        opened.
        """
        with self._refreshing:
            if names is None:
                files = self._opened([name for name in answer_names(self.folder) if name not in self._seen])
            else:
                files = [self._open(name) for name in names if name not in self._seen]
            for file in files:
                number = len(self.files) << 32
                self.files.append(file)
                self._seen.add(file.path.name)
                pieces = self._pieces
                for place, key in enumerate(file.keys, number):
                    pieces[key] = (*pieces[key], place) if key in pieces else (place,)
        return len(files)

    def _opened(self, names: Sequence[str]) -> list[AnswerFile]:
        """These files, without those that were deleted since the folder was read."""
        found = []
        for name in names:
            with suppress(FileNotFoundError):
                found.append(self._open(name))
        return found

    def _open(self, name: str) -> AnswerFile:
        return AnswerFile(self.folder / name, self._payload, self.header, self._header_digest)

    def __contains__(self, key: bytes) -> bool:
        """Whether the whole answer is there."""
        return self._complete(key) is not None

    def keys(self) -> Iterator[bytes]:
        """The keys of the whole answers."""
        return (key for key in list(self._pieces) if key != OUTPUT_LAYER and key in self)

    def sizes(self) -> Sizes:
        keys = [key for key in list(self._pieces) if key != OUTPUT_LAYER]
        whole = [key for key in keys if key in self]
        return Sizes(
            entries=len(whole),
            tokens=sum(map(self.rows_of, whole)),
            bytes=sum(file.bytes for file in self.files),
            files=len(self.files),
            incomplete=len(keys) - len(whole),
        )

    def rows_of(self, key: bytes) -> int:
        """How many rows an answer has. KeyError if nothing of it is there."""
        number = self._pieces[key][0]
        return int(self.files[number >> 32].rows[number & 0xFFFFFFFF, 2])

    def read(self, key: bytes, rows: Sequence[Span], columns: Shard, out: Sequence[Tensor]) -> None:
        """Copies the rows of an answer into `out`, one span after the other: [rows of all spans, ...].

        out: tensors of the payload's dtypes on any device; any strides. columns: of the vocabulary; not read where the
        payload does not depend on columns. KeyError if the answer is not there as a whole; ValueError for rows, columns
        or tensors that do not fit; CacheError if a file is gone or has been cut since it was opened.
        """
        numbers = self._complete(key)
        if numbers is None:
            raise KeyError(key.hex())
        of_rows, vocabulary = self.rows_of(key), self.header.vocab_size
        if self._payload.whole:
            columns = Shard(0, vocabulary)
        for span in rows:
            if not 0 <= span.start <= span.stop <= of_rows:
                raise expected("rows", f"spans within [0, {of_rows})", span)
        if not 0 <= columns.start <= columns.stop <= vocabulary:
            raise expected("columns", f"a span within [0, {vocabulary})", columns)
        check_tensors("out", out, self._payload, sum(span.width for span in rows), columns.width)
        first = 0
        for span in rows:
            wanted = _Area(span.start, span.stop, columns.start, columns.stop)
            for number, area in _found(wanted, [(n, self._area(n)) for n in numbers]):
                self._copy(number, area, out, first - span.start, columns.start)
            first += span.width

    def head(self, columns: Shard) -> Tensor:
        """The rows of the teacher's output layer that belong to these columns: [columns.width, size]."""
        if OUTPUT_LAYER not in self:
            raise expected("cache", "one with the output layer of its teacher", self.folder, CacheError)
        weight = torch.empty(columns.width, self._payload.state_size, dtype=self._payload.state_dtype)
        self.read(OUTPUT_LAYER, [Span(columns.start, columns.stop)], columns, [weight])
        return weight

    def _complete(self, key: bytes) -> list[int] | None:
        """Pieces of one run that are together the whole answer: of the run that is the first to have all of it, in the
        order of the files. So files that are opened later change no answer, and ranks that have opened the same files
        in the same order read the same answer."""
        runs: dict[str, list[int]] = {}
        for number in self._pieces.get(key, ()):
            mine = runs.setdefault(self.files[number >> 32].run, [])
            mine.append(number)
            whole = _Area(0, self.rows_of(key), 0, self.header.vocab_size)
            areas = [(number, self._area(number)) for number in mine]
            if sum(area.size for _, area in _found(whole, areas)) == whole.size:
                return mine
        return None

    def _area(self, number: int) -> _Area:
        file = self.files[number >> 32]
        start, stop, _ = file.rows[number & 0xFFFFFFFF].tolist()
        return _Area(start, stop, file.columns.start, file.columns.stop)

    def _copy(self, number: int, area: _Area, out: Sequence[Tensor], shift: int, first_column: int) -> None:
        """Copies a part of a piece. shift: what is added to a row of the sequence to get the row of `out`."""
        file, place = self.files[number >> 32], number & 0xFFFFFFFF
        row = int(file.first[place]) + area.top - int(file.rows[place, 0])
        file.check()
        for source, target in zip(self._mapped(file), out, strict=True):
            source = source[row : row + area.bottom - area.top]
            target = target[area.top + shift : area.bottom + shift]
            if not self._payload.whole:
                source = source[:, area.left - file.columns.start : area.right - file.columns.start]
                target = target[:, area.left - first_column : area.right - first_column]
            target.copy_(source)


class _Area(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of an answer."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def _found(wanted: _Area, pieces: Iterable[tuple[int, _Area]]) -> Iterator[tuple[int, _Area]]:
    """Which part of which piece to take for an area: the parts are disjoint, also where pieces overlap."""
    missing = [wanted] if wanted.size else []
    for number, piece in pieces:
        rest: list[_Area] = []
        for area in missing:
            top, bottom = max(area.top, piece.top), min(area.bottom, piece.bottom)
            left, right = max(area.left, piece.left), min(area.right, piece.right)
            if top >= bottom or left >= right:
                rest.append(area)
                continue
            yield number, _Area(top, bottom, left, right)
            around = (
                _Area(area.top, top, area.left, area.right),
                _Area(bottom, area.bottom, area.left, area.right),
                _Area(top, bottom, area.left, left),
                _Area(top, bottom, right, area.right),
            )
            rest += [part for part in around if part.size]
        missing = rest
        if not missing:
            return


def answer_names(folder: Path) -> list[str]:
    """The names of the files with answers, sorted; CacheError if the folder cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(e.name for e in found if atomic.is_written(e.name, "answers", ".safetensors"))
    except OSError as error:
        raise expected(
            "cache", "a folder", f"{os.fspath(folder)!r} ({error.strerror})", CacheError
        ) from error


def check_tensors(name: str, tensors: Sequence[Tensor], payload, rows: int, width: int) -> None:
    """ValueError unless these are the tensors of that many rows and columns."""
    wanted = [t.squeeze(1) for t in payload.blank(rows, 1, width, empty=_shape_only)]
    got = [(tuple(t.shape), t.dtype) for t in tensors]
    if got != [(tuple(t.shape), t.dtype) for t in wanted]:
        shown = [", ".join(f"{t.dtype} {list(t.shape)}" for t in each) for each in (wanted, tensors)]
        raise expected(name, shown[0], shown[1])


def _shape_only(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
