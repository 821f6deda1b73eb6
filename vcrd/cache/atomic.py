"""Files that are whole or absent: unique names, temporary files, and what a killed writer leaves."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vcrd.cache.header import CacheError

# A writer on another host cannot be looked for. No file takes a day, so after these seconds the writer is gone.
_ABANDONED = 24 * 3600.0
_TEMPORARY = re.compile(r"\.(answers|header\.json)-.+\.(?P<pid>\d+)@(?P<place>.+)\.tmp")


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Names:
    """File names that no other process or object gives: prefix, a random number, a running one, and the suffix."""

    def __init__(self, prefix: str, suffix: str) -> None:
        self._prefix, self._suffix, self._token, self._count = prefix, suffix, secrets.token_hex(8), 0

    def next(self) -> str:
        self._count += 1
        return f"{self._prefix}-{self._token}-{self._count:06d}{self._suffix}"


def is_written(name: str, prefix: str, suffix: str) -> bool:
    """Whether `Names` with this prefix and suffix may have given the name."""
    return re.fullmatch(rf"{re.escape(prefix)}-[0-9a-f]{{16}}-\d{{6,}}{re.escape(suffix)}", name) is not None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """CacheError of one sentence in place of an OSError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        need = "enough space on the file system" if full else "a folder that can be written to"
        raise CacheError(
            f"{what}: expected {need}, got {error.strerror or error} (errno {error.errno})"
        ) from error


def write(folder: Path, name: str, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a file: under `name` it is whole or absent. `fill` gets the open file. OSError leaves nothing behind."""
    temporary = _temporary(folder, name)
    try:
        _write_temporary(temporary, fill)
        os.rename(temporary, folder / name)
        _synchronise(folder)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def create(folder: Path, name: str, data: bytes) -> bool:
    """Writes a file unless there is one of this name, and says whether it did. Of several processes one does."""
    temporary = _temporary(folder, f"{name}-{secrets.token_hex(8)}")
    try:
        _write_temporary(temporary, lambda file: file.write(data))
        os.link(temporary, folder / name)  # fails where the name is taken, as a rename would not
        _synchronise(folder)
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _write_temporary(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    with open(path, "xb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def _synchronise(folder: Path) -> None:
    """Makes the names of a folder durable, on file systems that can do this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}@{_place()}.tmp"


def _place() -> str:
    """Where a process number has a meaning, until when: the host, its boot, and the name space of a container. The name
    of a host is not enough, since containers and clusters share names."""
    host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return host
    return f"{host}.{boot}.{space}"


def abandoned(folder: Path) -> list[Path]:
    """Temporary files whose writer is gone: killed on this host, or a day ago."""
    found, here, now = [], _place(), time.time()
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        with suppress(FileNotFoundError):
            killed = match["place"] == here and not _alive(int(match["pid"]))
            if killed or now - path.stat().st_mtime > _ABANDONED:
                found.append(path)
    return found


def remove_abandoned(folder: Path) -> None:
    for path in abandoned(folder):
        with suppress(FileNotFoundError):  # another writer removes it as well
            path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
