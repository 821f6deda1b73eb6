"""Files of records: one file per rank, one JSON object per line. An error in writing never stops the run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_log = logging.getLogger("vcrd")


class RecordFile:
    """Appends records to `path`, with one write call per record, so that a crash loses none that was written.

    If the file cannot be written to, one warning says so, and the next record tries again. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._torn = False  # whether the last line is incomplete
        self._warned = False

    def write(self, record: dict[str, Any]) -> None:
        """Never raises OSError. NaN and infinities, which JSON does not have, are written as null."""
        line = json.dumps(_plain(record), separators=(",", ":")) + "\n"
        try:
            if self._file is None:
                self._open()
            data = ("\n" * self._torn + line).encode()
            self._torn = True
            self._torn = os.write(self._file, data) < len(data)
        except OSError as error:
            self.close()
            if not self._warned:
                self._warned = True
                _log.warning("telemetry_dir: %s cannot be written (%s); the run goes on", self._path, error)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.close(file)
            except OSError:  # a network file system may report only now that it lost data
                pass

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, in order. Lines that are incomplete, or hold no record, are skipped."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record:
                yield record


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
