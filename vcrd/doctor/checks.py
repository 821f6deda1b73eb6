"""What a check is given, and how it runs so that it can neither hang nor crash the doctor. No torch."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vcrd.doctor.findings import Finding, problem
from vcrd.doctor.processes import World
from vcrd.plan.scenario import Scenario

if TYPE_CHECKING:
    from vcrd.settings import LinkSettings

_SHORTEST_TIMEOUT = 2.0  # seconds for each check, however long the earlier checks took
_IMPORT_TIMEOUT = 30.0  # seconds
_import_lock = threading.Lock()
_import_crashes: dict[str, str] = {}


@dataclass(frozen=True)
class Options:
    """The options of the command, checked.

    run_dir: the folder that all nodes share; None if not given. ports: must be free on every node. gpus: every node
    must have at least so many; 0 if not given. scenario: both layouts; None if not given. models_known: the scenario
    has the sizes of the models too. timeout: seconds to wait for other processes, and for one check. seconds: how long
    the link is measured. during_run: a run already uses the GPUs and the ports.
    """

    run_dir: str | None = None
    ports: tuple[int, ...] = ()
    gpus: int = 0
    scenario: Scenario | None = None
    models_known: bool = False
    timeout: float = 60.0
    seconds: float = 2.0
    during_run: bool = False


@dataclass(frozen=True)
class Job:
    """What each check is given. link: settings of the link, with the default for a variable that is wrong. secret: of
    the link; None if it has not been read, or could not be read in time.
    """

    world: World
    environment: Mapping[str, str]
    link: LinkSettings
    options: Options = field(default_factory=Options)
    secret: str | None = None

    @property
    def first(self) -> LinkSettings:
        """The settings of the first teacher, which stands for all where one of them is looked at."""
        return self.link.of(self.link.teachers()[0])

    @property
    def first_on_node(self) -> bool:
        return self.world.local_rank == 0

    @property
    def on_one_node(self) -> bool:
        """All processes are on one node, as far as the launcher says."""
        return len(self.world.expected) == 1 or self.world.local_size == self.world.size


Check = Callable[[Job], list[Finding]]


def run_checks(job: Job, *checks: Check) -> list[Finding]:
    """One check may take `options.timeout` seconds, all together one and a half times as long."""
    timeout = job.options.timeout
    deadline = time.monotonic() + 1.5 * timeout
    found: list[Finding] = []
    for check in checks:
        left = max(_SHORTEST_TIMEOUT, deadline - time.monotonic())
        found += run_check(check, job, min(timeout, left))
    return found


def run_check(check: Check, job: Job, seconds: float) -> list[Finding]:
    """The findings of a check. A check that takes too long or raises an exception becomes a finding itself."""
    name = check.__name__.replace("_", " ")
    try:
        found = with_timeout(seconds, lambda: check(job), None)
    except Exception as error:  # a bug in one check must not hide the findings of the others
        fix = "Please report this with the output of `python -m vcrd doctor --json`."
        return [problem("check", f"{name}: the check itself failed: {error!r:.200}", fix)]
    if found is None:
        fix = "Look at that node: usually a file system, a driver or a GPU hangs. --timeout gives the check more time."
        return [problem("check", f"{name}: no answer within {seconds:.3g} seconds", fix)]
    return found


def with_timeout(seconds: float, call: Callable[[], Any], default: Any) -> Any:
    """The result or the exception of the call; `default` if it takes longer. Its thread then stays behind."""
    results: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=run, name="vcrd-doctor-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        return default
    value, error = results[0]
    if error is not None:
        raise error
    return value


def import_crash(module: str, seconds: float = _IMPORT_TIMEOUT) -> str:
    """Imports a module in a forked child, since an import may crash or hang its process.

    Returns "crashes with SIGSEGV" or "does not finish within ... seconds", and "" if the child survives. An exception
    counts as survival: the caller can safely import the module and catch it. The fork spares the child all imports that
    this process has done already. No CUDA context may be open. The result of each module is remembered.
    """
    with _import_lock:
        if module not in _import_crashes:
            known = module in sys.modules
            _import_crashes[module] = "" if known else _import_in_child(module, min(seconds, _IMPORT_TIMEOUT))
        return _import_crashes[module]


def _import_in_child(module: str, seconds: float) -> str:
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of a fork with threads; the child uses none of them
        child = os.fork()
    if child == 0:
        _import_and_exit(module, seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended and os.WIFSIGNALED(status):
            return f"crashes with {signal.Signals(os.WTERMSIG(status)).name}"
        if ended:
            return ""
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"does not finish within {seconds:g} seconds"


def _import_and_exit(module: str, seconds: float) -> None:
    try:
        # The alarm ends the child if the parent is gone and the import never returns to Python.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(seconds) + 5)
        faulthandler.disable()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        importlib.import_module(module)
    finally:
        os._exit(0)
