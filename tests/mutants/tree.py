"""A copy of the checkout for mutants. It has separate builds, and ends every process that it starts.

The copy stays in build/mutants/tree, so that ninja compiles only files that changed since the last run.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/mutants"
# In the environment of all processes that this module starts. VCRD_ would make it the name of a setting.
_MARK = "MUTANTS_OF_VCRD"
_BUILD_SECONDS = 1800  # the first build of the emulation takes minutes


class Broken(Exception):
    """The campaign cannot continue; the message says why."""


@dataclass(frozen=True)
class Ended:
    """The end of a command. code: None if it was killed at its limit."""

    code: int | None
    output: str
    seconds: float


class Tree:
    """The copy. Only one process may use it at a time.

    systems: the interpreter where the systems of vcrd/integrations are installed, or None.
    """

    def __init__(self, systems: Path | None = None) -> None:
        self.root = FOLDER / "tree"
        self._systems = systems
        self._saved = FOLDER / "built"  # the builds of the copy without a mutant
        self._planted = FOLDER / "planted"  # while a mutant is active: the changed file
        self._mark = uuid.uuid4().hex
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            # Python identifies a cached module by size and second of writing, and a mutant may have the same.
            "PYTHONDONTWRITEBYTECODE": "1",
            _MARK: self._mark,
        }
        self._emulation: dict[str, str] | None = None  # environment of a run on emulated kernels

    def mirror(self) -> None:
        """Makes the copy equal to the checkout: tracked files, and untracked ones that git does not ignore."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
        for name in sorted(names):
            source, target = ROOT / name, self.root / name
            if not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)  # with the current time, so that ninja sees the change
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            ours = name.startswith("build/") or path.suffix == ".so"
            if path.is_file() and not ours and name not in names:
                path.unlink()
        if self._planted.exists():  # the last run was killed, and its build may have the mutant
            path = self.root / self._planted.read_text()
            if path.exists():
                path.touch()
            self._planted.unlink()

    def build(self, emulated: bool) -> None:
        """Builds the extension, and the emulated CUDA kernels if needed. Broken with the last lines of the compiler."""
        done = self.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], _BUILD_SECONDS)
        if done.code != 0:
            raise Broken(f"the extension did not build:\n{done.output[-3000:]}")
        if emulated:
            self._emulation = self._emulated()

    def _emulated(self) -> dict[str, str]:
        script = (
            "import json, emulated_build as e; print(json.dumps([str(e.build_module()), e.environment()]))"
        )
        folder = self.root / "tests/cuda_emulation"
        own = {**self._environment, "PYTHONPATH": f"{folder}{os.pathsep}{self.root}"}
        done = self.run([sys.executable, "-c", script], _BUILD_SECONDS, own)
        if done.code != 0:
            raise Broken(f"the emulated kernels did not build:\n{done.output[-3000:]}")
        module, environment = json.loads(done.output.splitlines()[-1])
        # On a signal the interpreter prints its test. pytest has captured the output of a sanitizer.
        for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS"):
            environment[name] += ":abort_on_error=1"
        return {**environment, "VCRD_TEST_MODULE": module, "PYTHONPATH": str(self.root)}

    def check_imports(self) -> None:
        """Checks that tests in the copy import the package of the copy."""
        for python in filter(None, (sys.executable, self._systems)):
            done = self.run([str(python), "-c", "import vcrd; print(vcrd.__file__)"], 120)
            if done.code != 0 or str(self.root) not in done.output:
                raise Broken(f"the copy does not import its own vcrd: {done.output[-500:]}")

    @contextlib.contextmanager
    def planted(self, file: str, old: str, new: str, emulated: bool) -> Iterator[float]:
        """While open, the copy has the mutant and is built with it. Yields the seconds of the build.

        Afterwards the earlier build is restored with its times, so that ninja treats it as up to date.
        """
        path = self.root / file
        before, times = path.read_text(), path.stat()
        if before.count(old) != 1:
            raise Broken(f"{file} has the text to replace {before.count(old)} times, expected once: {old!r}")
        compiled = file.startswith("csrc/")
        if compiled:
            self._save()
        begun = time.monotonic()
        self._planted.write_text(file)
        try:
            path.write_text(before.replace(old, new))
            if compiled:
                built = self._built(emulated)
                kept = _digest(built)
                self._emulated() if emulated else self.build(False)
                if _digest(built) == kept:
                    raise Broken(f"{file}: the build with the mutant equals the build without it")
            yield time.monotonic() - begun
        finally:
            path.write_text(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if compiled:
                self._restore()
            self._planted.unlink()

    def _built(self, emulated: bool) -> Path:
        if emulated:
            return Path(self._emulation["VCRD_TEST_MODULE"])
        (module,) = (self.root / "vcrd").glob("_C*.so")
        return module

    def _pairs(self) -> list[tuple[Path, Path]]:
        """Each file that a build writes, and the place of its copy."""
        places = [self.root / "build", *(self.root / "vcrd").glob("_C*.so")]
        files = [f for p in places for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()]
        return [(file, self._saved / file.relative_to(self.root)) for file in files]

    def _save(self) -> None:
        for file, copy in self._pairs():
            if not (copy.exists() and _same_times(file, copy)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)

    def _restore(self) -> None:
        for file, copy in self._pairs():
            if not copy.exists():
                file.unlink()
            elif not _same_times(file, copy):
                shutil.copy2(copy, file)

    def pytest(
        self, arguments: Sequence[str], seconds: float, emulated: bool = False, systems: bool = False
    ) -> Ended:
        """Runs pytest in the copy, up to the first failure. systems: where the systems are installed."""
        python, environment = sys.executable, self._emulation if emulated else None
        if systems:
            python = str(self._systems)
            path = f"{self._systems.parent}{os.pathsep}{os.environ['PATH']}"
            environment = {**self._environment, "PATH": path}
        command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        return self.run(command, seconds, environment)

    def run(self, command: list[str], seconds: float, environment: dict[str, str] | None = None) -> Ended:
        """Runs a command in the copy, in a new session. Ends all of its processes afterwards."""
        begun = time.monotonic()
        log = FOLDER / "output.txt"
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(log, "w+b") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self._environment if environment is None else {**environment, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._kill_the_rest()
        return Ended(code, log.read_text(errors="replace"), time.monotonic() - begun)

    def _kill_the_rest(self) -> None:
        """Processes that left the session, as torchrun workers do, found by the mark in their environment."""
        mark = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)


def _same_times(a: Path, b: Path) -> bool:
    first, second = a.stat(), b.stat()
    return (first.st_mtime_ns, first.st_size) == (second.st_mtime_ns, second.st_size)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
