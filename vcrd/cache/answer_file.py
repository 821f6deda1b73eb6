"""One file of a cache: a safetensors file that any reader of that format can open. `files` describes what is in it."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vcrd.cache import atomic
from vcrd.cache.header import KEY_BYTES, CacheError, CacheHeader
from vcrd.errors import expected
from vcrd.link.payload import Payload
from vcrd.link.plan import Shard

FORMAT = "vcrd-answers-1"
_NAMES = {"topk": ("logprobs", "ids", "log_tail"), "hidden": ("states",)}
_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_DTYPE_OF = {code: dtype for dtype, code in _DTYPES.items()}
_ALIGNMENT = 64  # bytes, of the first tensor in the file
_FIRST_READ = 1 << 16  # bytes; holds header, keys and rows of most files
_LONGEST_HEADER = 1 << 20
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Contents:
    """What goes into a file: of each piece its key, (first row, last + 1, rows of the answer) and its tensors."""

    keys: list[bytes]
    rows: list[tuple[int, int, int]]
    tensors: list[list[Tensor]]
    columns: Shard
    run: str


def write_answers(folder: Path, name: str, contents: Contents, payload: Payload, header: str) -> None:
    """Writes a file. header: the digest of the header of the cache. CacheError if it cannot be written."""
    total = sum(stop - start for start, stop, _ in contents.rows)
    keys = np.frombuffer(b"".join(contents.keys), np.uint8)
    rows = np.array(contents.rows, "<i8")
    blocks = [keys, rows.reshape(-1).view(np.uint8)]
    for slot in range(len(contents.tensors[0])):
        blocks += [piece[slot].reshape(-1).view(torch.uint8).numpy() for piece in contents.tensors]
    metadata = {
        "format": FORMAT,
        "header": header,
        "run": contents.run,
        "columns": f"{contents.columns.start}:{contents.columns.stop}",
    }
    described = _layout(payload, len(contents.keys), total, contents.columns.width)
    digest = _digest(described | {"__metadata__": metadata})
    for block in blocks:
        digest.update(block)
    text = json.dumps(described | {"__metadata__": metadata | {"digest": digest.hexdigest()}}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            file.write(block)

    lost = f"{sum(block.nbytes for block in blocks):,} bytes of answers are not stored"
    with atomic.writing(f"the cache {folder}: {lost}"):
        atomic.write(folder, name, fill)


def _layout(payload: Payload, pieces: int, rows: int, width: int) -> dict[str, Any]:
    """The header of the safetensors file, without its metadata."""
    tensors = [t.squeeze(1) for t in payload.blank(rows, 1, width, _shape_only)]
    named = {
        "keys": (torch.uint8, [pieces, KEY_BYTES]),
        "rows": (torch.int64, [pieces, 3]),
        **{
            name: (tensor.dtype, list(tensor.shape))
            for name, tensor in zip(_names(payload), tensors, strict=True)
        },
    }
    described, start = {}, 0
    for name, (dtype, shape) in named.items():
        stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        described[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    return described


def _names(payload: Payload) -> tuple[str, ...]:
    return _NAMES.get(payload.name, ("logits",))


def _shape_only(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _digest(described: dict[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())


class AnswerFile:
    """A file that has been opened: its pieces are known, its contents are mapped when they are read.

    keys: of the pieces. rows: int64 [pieces, 3]. first: int64 [pieces], the first row of each piece in the tensors.
    Opening reads the header, keys and rows, and checks that the file is one of this cache and that all of it is there:
    CacheError if not. FileNotFoundError if there is none.
    """

    def __init__(self, path: Path, payload: Payload, header: CacheHeader, header_digest: str) -> None:
        self.path = path
        self._payload = payload
        try:
            with open(path, "rb", buffering=0) as file:
                self.bytes = os.fstat(file.fileno()).st_size
                self._read_index(file, header, header_digest)
        except FileNotFoundError:
            raise
        except Exception as error:  # a file of another kind may lead to any
            raise self._wrong(error) from error

    def _read_index(self, file: Any, header: CacheHeader, header_digest: str) -> None:
        start = file.read(_FIRST_READ)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or not 2 <= length <= _LONGEST_HEADER or 8 + length > self.bytes:
            raise expected("length", "that of a safetensors file", f"{self.bytes} bytes")
        if len(start) < 8 + length:
            start += _exactly(file, 8 + length - len(start))
        described = json.loads(start[8 : 8 + length])
        metadata = described["__metadata__"]
        if metadata.get("format") != FORMAT:
            raise expected("format", FORMAT, repr(metadata.get("format")))
        if metadata["header"] != header_digest:
            raise expected(
                "header", f"{header_digest[:12]} as the header of the cache", metadata["header"][:12]
            )
        self.run, self.digest = str(metadata["run"]), str(metadata["digest"])
        self.columns = Shard(*map(int, metadata["columns"].split(":")))
        if not 0 <= self.columns.start < self.columns.stop <= header.vocab_size:
            raise expected("columns", f"a span within [0, {header.vocab_size})", metadata["columns"])
        pieces, total = described["keys"]["shape"][0], self._total(described)
        if {k: v for k, v in described.items() if k != "__metadata__"} != _layout(
            self._payload, pieces, total, self.columns.width
        ):
            raise expected("tensors", f"those of the payload {self._payload.name!r}", "others")
        self._described, self._data = described, 8 + length
        end = max(tensor["data_offsets"][1] for name, tensor in described.items() if name != "__metadata__")
        if self._data + end != self.bytes:
            raise expected("length", f"{self._data + end} bytes", self.bytes)
        index = start[8 + length :]
        need = described["rows"]["data_offsets"][1]
        if len(index) < need:
            index += _exactly(file, need - len(index))
        self.keys = [index[i : i + KEY_BYTES] for i in range(0, pieces * KEY_BYTES, KEY_BYTES)]
        self.rows = np.frombuffer(index[pieces * KEY_BYTES : need], "<i8").reshape(-1, 3)
        starts, stops, of_rows = self.rows.T
        widths = stops - starts
        if (starts < 0).any() or (widths <= 0).any() or (stops > of_rows).any() or widths.sum() != total:
            raise expected("rows", f"spans of {total} rows", "others")
        self.first = np.cumsum(widths) - widths

    def _total(self, described: dict[str, Any]) -> int:
        return described[_names(self._payload)[0]]["shape"][0]

    def mapped(self) -> list[Tensor]:
        """The contents, [all rows, ...] in the order of the payload, mapped anew: to be read only, since writing to
        them ends the process. The mapping ends with the last of these tensors. CacheError as for `check`."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                # Python's map, because that of torch can be written to: where the kernel does not overcommit, it counts
                # as memory of the process. This one keeps a file descriptor.
                data = mmap.mmap(file.fileno(), self.bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than it was
            raise self._wrong(error) from error
        tensors = []
        for name in _names(self._payload):
            described = self._described[name]
            dtype, (start, stop) = _DTYPE_OF[described["dtype"]], described["data_offsets"]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                flat = torch.frombuffer(
                    data, dtype=dtype, offset=self._data + start, count=(stop - start) // dtype.itemsize
                )
            tensors.append(flat.view(described["shape"]))
        return tensors

    def check(self) -> None:
        """CacheError if the file is gone, or shorter than it was: reading its mapping would end the process."""
        try:
            length = os.stat(self.path).st_size
        except OSError as error:
            raise self._wrong(error) from error
        if length != self.bytes:
            raise self._wrong(expected("length", f"{self.bytes} bytes", length))

    def verify(self) -> None:
        """Reads the whole file; CacheError unless it has the digest that its writer has put into it."""
        metadata = {k: v for k, v in self._described["__metadata__"].items() if k != "digest"}
        digest = _digest(self._described | {"__metadata__": metadata})
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._data)
                for block in _blocks(file):
                    digest.update(block)
        except OSError as error:
            raise self._wrong(error) from error
        if digest.hexdigest() != self.digest:
            raise self._wrong(expected("digest", self.digest[:12], digest.hexdigest()[:12]))

    def _wrong(self, error: Exception) -> CacheError:
        if isinstance(error, OSError):
            return expected(str(self.path), "a file that can be read", error.strerror or error, CacheError)
        got = str(error) if isinstance(error, ValueError) else f"another header ({error!r})"
        text = f"{self.path}: expected a whole file of answers of this cache, got one with {got}"
        return CacheError(f"{text}; delete it, and fill the cache again")


def _exactly(file: Any, length: int) -> bytes:
    parts = []
    while length:
        part = file.read(length)
        if not part:
            raise expected("length", f"{length} bytes more", "the end of the file")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block
