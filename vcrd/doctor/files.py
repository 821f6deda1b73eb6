"""The folder that all nodes of a run share: whether it can be written here, and whether it is the same everywhere."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vcrd.doctor.findings import Finding, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job
from vcrd.link import addresses

_LEAST_SPACE = 1e9
# Bytes that a checkpoint takes for each parameter: bfloat16, and float32 of the weight and of Adam's two moments.
_CHECKPOINT = 14
_PATIENCE = 5.0  # seconds: NFS shows a new file to other nodes after a while


def folder_of(job: Job) -> str | None:
    """--run-dir, else where the file of VCRD_ADDRESS is to lie."""
    if job.run_dir is not None:
        return os.path.abspath(job.run_dir)
    if job.link.address.startswith(addresses.SCHEME):
        return os.path.dirname(job.link.address.removeprefix(addresses.SCHEME))
    return None


def check(job: Job) -> list[Finding]:
    """What one process can see alone."""
    if not job.first_on_node:
        return []
    folder = folder_of(job)
    if folder is None:
        return [unchecked("run directory", "not named; --run-dir is what all nodes share")]
    if refused := _refused(folder, "--run-dir (and in the run's own arguments)"):
        text, fix = refused
        return [fault("run directory", text, fix)]
    return [
        ok("run directory", f"{folder} can be written, and a file there replaced in one step"),
        _space(job, folder),
    ]


def telemetry(job: Job) -> list[Finding]:
    folder = job.environment.get("VCRD_TELEMETRY_DIR")
    if not folder or not job.first_on_node:
        return []
    if refused := _refused(folder, "VCRD_TELEMETRY_DIR"):
        text, fix = refused
        return [fault("telemetry", text, fix)]
    return [ok("telemetry", f"VCRD_TELEMETRY_DIR={folder} can be written")]


def _refused(folder: str, where: str) -> tuple[str, str] | None:
    """Why a folder cannot be made or written, and the fix; None where it can. where: what it is named in."""
    try:
        os.makedirs(folder, exist_ok=True)
        _write(folder)
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or first_line(error)}", _mend(error, where)
    return None


def _mend(error: OSError, where: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Remove old checkpoints there, or have the quota raised."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"Name a folder in {where}, since a file is in its way."
    return f"Name in {where} a folder that this user may write on every node."


def _write(folder: str) -> None:
    """As the run does: a file is written beside its place and takes it. OSError where that cannot be."""
    place, draft = (Path(folder) / f".vcrd-doctor-{os.getpid()}{ending}" for ending in ("", ".draft"))
    try:
        for text in ("first", "second"):
            with open(draft, "w") as file:
                file.write(text)
                os.fsync(file.fileno())
            os.replace(draft, place)
            if place.read_text() != text:
                raise OSError(None, "what was written is not what is read")
    finally:
        for path in (place, draft):
            with suppress(OSError):
                path.unlink()


def _space(job: Job, folder: str) -> Finding:
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    needed, what = _LEAST_SPACE, "a run"
    if job.models_known:
        needed, what = _CHECKPOINT * job.scenario.student.params, "one checkpoint with Adam's state"
    if free < needed:
        text = f"{free / 1e9:.3g} GB free on {folder}, and {what} takes {needed / 1e9:.3g}"
        return fault("space", text, "Remove old checkpoints, or choose another folder.")
    return ok("space", f"{free / 1e9:.3g} GB free on {folder}")


class Shared:
    """Whether processes see each other's files: each writes one, all look for all, each removes its own.

    The three steps are taken by all processes together; who has no folder takes part with nothing.
    """

    def __init__(self, job: Job, token: str) -> None:
        self._folder = folder_of(job)
        self._rank = job.world.rank
        self._token = token
        self._mine: Path | None = None

    def write(self) -> bool:
        """Whether it could; `check` has a line for why not."""
        if self._folder is None:
            return False
        path = self._path(self._rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._token)
        except OSError:
            return False
        self._mine = path
        return True

    def look(self, writers: Sequence[int]) -> list[int]:
        """Of which ranks that wrote there is nothing here."""
        if self._mine is None:
            return []
        deadline = time.monotonic() + _PATIENCE
        missing = [rank for rank in writers if not self._has(rank)]
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            with suppress(OSError):
                os.listdir(self._folder)  # makes NFS look again
            missing = [rank for rank in missing if not self._has(rank)]
        return missing

    def remove(self) -> None:
        """Never fails."""
        if self._mine is not None:
            with suppress(OSError):
                self._mine.unlink()

    def finding(self, job: Job, missing: Sequence[int], nodes: dict[int, str]) -> Finding:
        """nodes: of the ranks that wrote."""
        if self._folder is None:
            return unchecked("shared folder", "no folder is named; --run-dir is what all nodes share")
        if self._mine is None:
            return unchecked("shared folder", f"nothing could be written to {self._folder}")
        if not missing:
            return ok("shared folder", f"{self._folder}: what one process writes, all others see")
        names = [f"{nodes[rank]} (rank {rank})" for rank in missing]
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} others" if len(names) > 4 else "")
        return fault(
            "shared folder",
            f"{self._folder} is not the folder of {listed} under this name",
            "Name in --run-dir a folder of a file system that every node mounts under the same path.",
        )

    def _path(self, rank: int) -> Path:
        return Path(self._folder) / f".vcrd-doctor-{self._token}-{rank}"

    def _has(self, rank: int) -> bool:
        try:
            return self._path(rank).read_text() == self._token
        except OSError:
            return False
