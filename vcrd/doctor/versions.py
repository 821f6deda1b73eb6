"""`python -m vcrd --version`: what a report of an error needs. It ends within a minute, whatever is broken here."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import vcrd
from vcrd.doctor.findings import first_line
from vcrd.doctor.packages import is_installed, version_of

_SECONDS = 50.0  # for what must be loaded; the first import of torch from a busy file system takes long
_LOADED = ("extension", "torch", "CUDA of torch", "NCCL of torch", "GPU", "driver")


def text(seconds: float = _SECONDS) -> str:
    """One line for each version."""
    found = lines(seconds)
    width = max(map(len, found)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in found.items())


def lines(seconds: float = _SECONDS) -> dict[str, str]:
    loaded = _loaded(seconds)
    return {
        "vcrd": _known(_vcrd),
        "extension": loaded["extension"],
        "Python": _known(lambda: f"{platform.python_version()}, {platform.platform()}"),
        "torch": loaded["torch"],
        "CUDA of torch": loaded["CUDA of torch"],
        "NCCL of torch": loaded["NCCL of torch"],
        "nccl4py": _known(lambda: _package("nccl", "nccl4py")),
        "megatron-core": _known(lambda: _package("megatron.core", "megatron-core")),
        "Transformer Engine": _known(
            lambda: _package("transformer_engine", "transformer_engine", "transformer-engine")
        ),
        "GPU": loaded["GPU"],
        "driver": loaded["driver"],
    }


def _known(call: Callable[[], str]) -> str:
    try:
        return call()
    except Exception as error:  # for example a file of metadata that cannot be read
        return f"not known: {first_line(error)}"


def _vcrd() -> str:
    """A wheel says in its version with which torch it was built, which `vcrd.__version__` does not."""
    folder = Path(vcrd.__file__).parent
    try:
        package = distribution("vcrd")
    except PackageNotFoundError:
        return f"{vcrd.__version__}, a checkout"
    place = Path(str(package.locate_file("vcrd")))
    return package.version if place.exists() and place.samefile(folder) else f"{vcrd.__version__}, a checkout"


def _package(module: str, *names: str) -> str:
    return version_of(*names) or ("a checkout" if is_installed(module) else "not installed")


def _loaded(seconds: float) -> dict[str, str]:
    """What `loaded` finds in a child process, which may crash or hang."""
    # With the same sys.path, whatever the options of this interpreter are.
    call = f"import sys; sys.path[:] = {sys.path!r}; from vcrd.doctor.loaded import main; main()"
    found: dict[str, str] = {}
    try:
        with tempfile.TemporaryFile("w+") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", call],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
            )
            why = _end_of(child, seconds)
            output.seek(0)
            for line in output:
                with contextlib.suppress(ValueError):  # the line that a killed child was writing
                    found |= json.loads(line)
    except OSError as error:
        why = f"not known: {first_line(error)}"
    missing = dict.fromkeys(_LOADED, "not known")
    first = next((name for name in ("GPU", "torch", "extension") if name not in found), None)
    if first is not None:
        missing[first] = why
    return missing | found


def _end_of(child: subprocess.Popen, seconds: float) -> str:
    """Waits for the child. Why it may have reported less than everything."""
    try:
        status = child.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        child.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # a process that waits for a driver cannot be killed
            child.wait(1)
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"loading it does not finish within {seconds:g} seconds"
    if status < 0:
        return f"loading it crashes with {signal.Signals(-status).name}"
    return f"loading it ends the process with status {status}"
