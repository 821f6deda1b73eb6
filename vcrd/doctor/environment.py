"""The environment of a process: settings, variables of CUDA and NCCL, limits of the system, and its folders."""

from __future__ import annotations

import difflib
import errno
import os
import resource
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from vcrd.doctor.checks import Job
from vcrd.doctor.findings import Finding, first_line, info, ok, problem, unchecked
from vcrd.settings import FILE_SCHEME, NAMES, DistillSettings, LinkSettings, variable_of

_INFINIBAND = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED_MEMORY = 1 << 30  # bytes
_LEAST_OPEN_FILES = 1024
_LEAST_SPACE = 1e9  # bytes
# Bytes of a checkpoint per parameter: bfloat16 weights, float32 weights and the two moments of Adam in float32.
_CHECKPOINT_BYTES = 14
_FILE_TIMEOUT = 5.0  # seconds; NFS shows a new file to other nodes with a delay
# Variables for debugging that make every run slow.
_DEBUG_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "NCCL_P2P_DISABLE": "GPUs of a node do not communicate over NVLink",
    "NCCL_SHM_DISABLE": "processes of a node communicate over the network",
}


def link_settings(environment: Mapping[str, str]) -> LinkSettings:
    """The settings of the link, without the variables that are wrong; `settings` reports those."""
    return DistillSettings.from_environment(_valid_and_wrong(environment)[0]).link


def _valid_and_wrong(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The values of the valid VCRD_ variables, and the error of each wrong one."""
    valid: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name in sorted(environment):
        if name.startswith("VCRD_"):
            try:
                DistillSettings.from_environment({**valid, name: environment[name]})
            except (TypeError, ValueError) as error:
                wrong[name] = first_line(error)
                continue
            valid[name] = environment[name]
    return valid, wrong


def settings(job: Job) -> list[Finding]:
    valid, wrong = _valid_and_wrong(job.environment)
    if wrong:
        return [_wrong_setting(name, text) for name, text in wrong.items()]
    # The secret must not be shown. The interface may differ between processes.
    shown = [name for name in valid if name not in ("VCRD_SECRET", "VCRD_INTERFACE")]
    text = ", ".join(f"{name}={valid[name]}" for name in shown) or "none set, so the defaults apply"
    return [ok("settings", text, "Set the VCRD_ variables to the same values in all processes.")]


def _wrong_setting(name: str, text: str) -> Finding:
    known = [variable_of(each) for each in NAMES]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"Write {close[0]} if you meant that, or unset it." if close else "Unset it."
        return problem("settings", f"{name} is not a setting of vcrd", fix)
    return problem("settings", text, "Correct the variable, or unset it.")


def secret(job: Job) -> list[Finding]:
    if job.link.secret_file is None:
        return []
    path = os.fspath(job.link.secret_file)
    try:
        job.link.shared_secret()
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        fix = "Set VCRD_SECRET_FILE to a readable file that holds the secret."
        return [problem("secret", first_line(error), fix)]
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return [problem("secret", f"other users can read {path}", f"Run `chmod 600 {path}`.")]
    return [ok("secret", f"in {path}")]


def debug_variables(job: Job) -> list[Finding]:
    environment = job.environment
    found = [
        problem("debug variables", f"{name}=1: {what}", f"Unset {name}.")
        for name, what in _DEBUG_VARIABLES.items()
        if _on(environment.get(name))
    ]
    if _on(environment.get("NCCL_IB_DISABLE")) and (adapters := infiniband_adapters()):
        text = f"NCCL_IB_DISABLE=1, but the node has InfiniBand ({', '.join(adapters)})"
        found.append(problem("debug variables", text, "Unset NCCL_IB_DISABLE."))
    return found


def _on(text: str | None) -> bool:
    return text is not None and text.strip() not in ("", "0")


def connections(job: Job) -> list[Finding]:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = job.environment.get(name)
    run = job.options.scenario
    tensor_size = 1 if run is None else max(run.student_tensor, run.teacher_tensor)
    if tensor_size > 1 and value != "1" and torch.cuda.is_available():
        return [
            problem(
                "connections",
                f"{name} is {value or 'not set'} with tensor parallelism {tensor_size}",
                f"Set {name}=1, as Megatron requires (except with FSDP or on Blackwell).",
            )
        ]
    text = f"{name}={value}" if value else f"{name} is not set; Megatron requires 1 with tensor parallelism"
    return [(info if value != "1" else ok)("connections", text)]


def infiniband_adapters() -> list[str]:
    try:
        return sorted(os.listdir(_INFINIBAND))
    except OSError:
        return []


def shared_memory(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    try:
        space = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return [unchecked("shared memory", f"{_SHARED_MEMORY}: {error.strerror}")]
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    text = f"{free / 1e9:.3g} of {total / 1e9:.3g} GB of {_SHARED_MEMORY} are free"
    if free < _LEAST_SHARED_MEMORY:
        fix = "Start the container with --shm-size=8g or --ipc=host, or remove what fills /dev/shm."
        return [problem("shared memory", f"{text}; NCCL and the data loaders need more", fix)]
    return [ok("shared memory", text)]


def open_files(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(_LEAST_OPEN_FILES, 8 * job.world.size)
    if soft == resource.RLIM_INFINITY:
        return [ok("open files", "unlimited")]
    if soft >= needed:
        return [ok("open files", f"{soft} per process")]
    fix = f"Run `ulimit -n {max(65536, needed)}` before the job, or raise the limit of the container."
    if hard != resource.RLIM_INFINITY and hard < max(65536, needed):
        fix = "Raise the limit of what starts the job (LimitNOFILE of slurmd, --ulimit nofile of the container)."
        if hard >= needed:
            fix = f"Run `ulimit -n {hard}` before the job."
    return [
        problem(
            "open files", f"{soft} per process, but a run of {job.world.size} processes needs {needed}", fix
        )
    ]


def locked_memory(job: Job) -> list[Finding]:
    """RDMA pins memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not job.first_on_node or not infiniband_adapters():
        return []
    if soft != resource.RLIM_INFINITY:
        fix = "Run `ulimit -l unlimited` before the job, or start the container with --ulimit memlock=-1."
        return [problem("locked memory", f"{soft / 1e6:.3g} MB per process, too little for InfiniBand", fix)]
    return [ok("locked memory", "unlimited")]


def folder_of(job: Job) -> str | None:
    """--run-dir, or else the folder of the first file in VCRD_ADDRESS."""
    if job.options.run_dir is not None:
        return os.path.abspath(job.options.run_dir)
    files = [each.address for each in job.link.teachers() if (each.address or "").startswith(FILE_SCHEME)]
    return os.path.dirname(files[0].removeprefix(FILE_SCHEME)) if files else None


def run_directory(job: Job) -> list[Finding]:
    """Whether this node can use the folder; `SharedFolder` checks whether all nodes see the same one."""
    if not job.first_on_node:
        return []
    folder = folder_of(job)
    if folder is None:
        return [unchecked("run directory", "not given; --run-dir names the folder that all nodes share")]
    if refused := _write_error(folder, "--run-dir and in the arguments of the run"):
        text, fix = refused
        return [problem("run directory", text, fix)]
    return [
        ok("run directory", f"{folder} can be written, and a file in it can be replaced atomically"),
        _space(job, folder),
    ]


def telemetry(job: Job) -> list[Finding]:
    folder = job.environment.get("VCRD_TELEMETRY_DIR")
    if not folder or not job.first_on_node:
        return []
    if refused := _write_error(folder, "VCRD_TELEMETRY_DIR"):
        text, fix = refused
        return [problem("telemetry", text, fix)]
    return [ok("telemetry", f"VCRD_TELEMETRY_DIR={folder} can be written")]


def _write_error(folder: str, where: str) -> tuple[str, str] | None:
    """Why a folder cannot be created or written, and the fix; None if it can. where: the option or variable with it."""
    try:
        os.makedirs(folder, exist_ok=True)
        _write(folder)
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or first_line(error)}", _fix(error, where)
    return None


def _fix(error: OSError, where: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Remove old checkpoints there, or ask for a larger quota."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"Name another folder in {where}: a file has this name."
    return f"Name a folder in {where} that this user can write on every node."


def _write(folder: str) -> None:
    """Replaces a file by renaming another, as the run does. OSError if that fails."""
    place, draft = (Path(folder) / f".vcrd-doctor-{os.getpid()}{ending}" for ending in ("", ".draft"))
    try:
        for text in ("first", "second"):
            with open(draft, "w") as file:
                file.write(text)
                os.fsync(file.fileno())
            os.replace(draft, place)
            if place.read_text() != text:
                raise OSError(None, "what is read differs from what was written")
    finally:
        for path in (place, draft):
            with suppress(OSError):
                path.unlink()


def _space(job: Job, folder: str) -> Finding:
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    needed, what = _LEAST_SPACE, "a run"
    if job.options.models_known:
        needed = _CHECKPOINT_BYTES * job.options.scenario.student.params
        what = "one checkpoint with the state of Adam"
    if free < needed:
        text = f"{free / 1e9:.3g} GB free in {folder}, but {what} takes {needed / 1e9:.3g}"
        return problem("space", text, "Remove old checkpoints, or choose another folder.")
    return ok("space", f"{free / 1e9:.3g} GB free in {folder}")


class SharedFolder:
    """Checks whether processes see the files of each other. Each writes a file, looks for all, and removes its own.

    All processes take these three steps together. A process that has no folder writes nothing.
    """

    def __init__(self, job: Job, token: str) -> None:
        self._folder = folder_of(job)
        self._rank = job.world.rank
        self._token = token
        self._mine: Path | None = None

    def write(self) -> bool:
        """Whether it succeeded; `run_directory` reports why not."""
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

    def missing(self, writers: Sequence[int]) -> list[int]:
        """The ranks that wrote a file that is not visible here."""
        if self._mine is None:
            return []
        deadline = time.monotonic() + _FILE_TIMEOUT
        missing = [rank for rank in writers if not self._has(rank)]
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            with suppress(OSError):
                os.listdir(self._folder)  # makes NFS refresh its cache
            missing = [rank for rank in missing if not self._has(rank)]
        return missing

    def remove(self) -> None:
        """Never fails."""
        if self._mine is not None:
            with suppress(OSError):
                self._mine.unlink()

    def finding(self, missing: Sequence[int], nodes: dict[int, str]) -> Finding:
        """nodes: of the ranks that wrote a file."""
        if self._folder is None:
            return unchecked("shared folder", "not given; --run-dir names the folder that all nodes share")
        if self._mine is None:
            return unchecked("shared folder", f"{self._folder} could not be written")
        if not missing:
            return ok("shared folder", f"{self._folder}: all processes see the files of each other")
        names = [f"{nodes[rank]} (rank {rank})" for rank in missing]
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} others" if len(names) > 4 else "")
        return problem(
            "shared folder",
            f"{self._folder} here and on {listed} are different folders",
            "Name a folder in --run-dir that every node mounts under the same path.",
        )

    def _path(self, rank: int) -> Path:
        return Path(self._folder) / f".vcrd-doctor-{self._token}-{rank}"

    def _has(self, rank: int) -> bool:
        try:
            return self._path(rank).read_text() == self._token
        except OSError:
            return False


CHECKS = (
    settings,
    secret,
    debug_variables,
    connections,
    shared_memory,
    open_files,
    locked_memory,
    run_directory,
    telemetry,
)
