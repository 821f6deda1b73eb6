"""Where the two jobs meet: at "host:port", or wherever a file on a shared file system says, "file:/path".

With a file nobody has to know a host before the jobs run: rank 0 of the student's world listens at a port that is free
and writes "host:port" there; everybody else reads it again with each question, so that a student that starts again
elsewhere is found. A teacher may be given a pattern, "file:/path/*": it meets the student whose file is the oldest of
those that answer.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import tempfile
from pathlib import Path

from vcrd.settings import FILE_SCHEME, host_and_port

from .errors import LinkError

Address = tuple[str, int]


def candidates(address: str) -> list[Address]:
    """Where to ask, in order. ConnectionError while no file says it."""
    if not address.startswith(FILE_SCHEME):
        return [host_and_port(address)]
    path = address.removeprefix(FILE_SCHEME)
    found = [place for file in _by_age(glob.glob(path)) if (place := _read(file))]
    if not found:
        raise ConnectionError(f"no student has written its address to {path} yet")
    return found


def publish(address: str, place: Address) -> None:
    """Writes the file, all of it or nothing; LinkError where that cannot be. Nothing to do for "host:port"."""
    if not address.startswith(FILE_SCHEME):
        return
    path = Path(address.removeprefix(FILE_SCHEME))
    if glob.has_magic(str(path)):
        raise LinkError(
            f"address must name one file in the student's job, for patterns are the teacher's, got {address}"
        )
    host, port = place
    text = f"[{host}]:{port}\n" if ":" in host else f"{host}:{port}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, hidden from a teacher's pattern; a rename is atomic, on NFS too.
        number, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(number, "w") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        raise LinkError(f"the address cannot be written to {path}: {error.strerror}") from error


def withdraw(address: str, place: Address) -> None:
    """Removes the file, if it is still this one's. Never fails."""
    path = address.removeprefix(FILE_SCHEME)
    if address.startswith(FILE_SCHEME) and _read(path) == place:
        with contextlib.suppress(OSError):
            os.unlink(path)


def outward_address() -> str:
    """This machine's IP address on the interface that leads outward; 127.0.0.1 where none does."""
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # of documentation
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # of a datagram socket: picks a route, sends nothing
            return probe.getsockname()[0]
    return "127.0.0.1"


def _by_age(paths: list[str]) -> list[str]:
    ages = {}
    for path in paths:
        with contextlib.suppress(OSError):
            ages[path] = os.stat(path).st_mtime
    return sorted(ages, key=lambda path: (ages[path], path))


def _read(path: str) -> Address | None:
    """None for a file that is not there or holds something else."""
    try:
        return host_and_port(Path(path).read_bytes()[:300].decode().strip())
    except (OSError, UnicodeDecodeError):
        return None
