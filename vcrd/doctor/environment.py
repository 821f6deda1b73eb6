"""What the environment of a process says: settings of vcrd, variables of CUDA and NCCL, limits of the system."""

from __future__ import annotations

import difflib
import os
import re
import resource
import socket
import stat
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch

from vcrd.doctor.findings import Finding, fact, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job
from vcrd.link.settings import LinkSettings
from vcrd.megatron.settings import DistillSettings

_INFINIBAND = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED = 1 << 30
_LEAST_FILES = 1024
# Switches that somebody set to find a fault, and that make every run slow.
_LEFT_OVER = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of a node do not talk over NVLink",
    "NCCL_SHM_DISABLE": "processes of a node talk over the network",
}


def link_settings(environment: Mapping[str, str]) -> LinkSettings:
    """Those of the run, without the variables that are wrong: `settings` has lines for these."""
    return DistillSettings.from_environment(_sorted_out(environment)[0]).link


def _sorted_out(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of vcrd that are right, and what is wrong with the others, by name."""
    good: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name in sorted(environment):
        if name.startswith("VCRD_"):
            try:
                DistillSettings.from_environment({**good, name: environment[name]})
            except (TypeError, ValueError) as error:
                wrong[name] = first_line(error)
                continue
            good[name] = environment[name]
    return good, wrong


def settings(job: Job) -> list[Finding]:
    good, wrong = _sorted_out(job.environment)
    if wrong:
        return [_wrong_setting(name, text) for name, text in wrong.items()]
    # Of these one must not be shown, and the other may differ from process to process.
    shown = [name for name in good if name not in ("VCRD_SECRET", "VCRD_INTERFACE")]
    text = ", ".join(f"{name}={good[name]}" for name in shown) or "none set, so the defaults hold"
    return [ok("settings", text, alike="Set the VCRD_ variables alike in all processes.")]


def _wrong_setting(name: str, text: str) -> Finding:
    known = ["VCRD_" + f.name.upper() for kind in (DistillSettings, LinkSettings) for f in fields(kind)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"Write {close[0]}, if that was meant, or unset it." if close else "Unset it."
        return fault("settings", f"{name} is no setting of vcrd", fix)
    # Settings name themselves, some as a field and some as the variable.
    own = "|".join(map(re.escape, (name, name.removeprefix("VCRD_").lower())))
    text = re.sub(f"^({own}):? ", "", text)
    return fault("settings", f"{name}: {text}", "Correct that variable, or unset it.")


def secret(job: Job) -> list[Finding]:
    if job.link.secret_file is None:
        return []
    path = os.fspath(job.link.secret_file)
    try:
        job.link.shared_secret()
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        return [
            fault(
                "secret",
                first_line(error),
                "Name in VCRD_SECRET_FILE a file that holds the secret and can be read.",
            )
        ]
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return [fault("secret", f"others may read {path}", f"Run `chmod 600 {path}`.")]
    return [ok("secret", f"in {path}")]


def left_over(job: Job) -> list[Finding]:
    environment = job.environment
    found = [
        fault("left over", f"{name}=1: {what}", f"Unset {name}.")
        for name, what in _LEFT_OVER.items()
        if _on(environment.get(name))
    ]
    if _on(environment.get("NCCL_IB_DISABLE")) and _names(_INFINIBAND):
        text = f"NCCL_IB_DISABLE=1, and there is InfiniBand here ({', '.join(_names(_INFINIBAND))})"
        found.append(fault("left over", text, "Unset NCCL_IB_DISABLE."))
    return found


def _on(text: str | None) -> bool:
    return text is not None and text.strip() not in ("", "0")


def connections(job: Job) -> list[Finding]:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = job.environment.get(name)
    if job.tensor_size > 1 and value != "1" and torch.cuda.is_available():
        return [
            fault(
                "connections",
                f"{name} is {value or 'not set'} with tensor parallelism {job.tensor_size}",
                f"Set {name}=1, as Megatron asks for (with FSDP, or on Blackwell, it may stay otherwise).",
            )
        ]
    text = f"{name}={value}" if value else f"{name} is not set; Megatron wants 1 with tensor parallelism"
    return [(fact if value != "1" else ok)("connections", text)]


def interfaces(job: Job) -> list[Finding]:
    """What NCCL and gloo are told to use: names or beginnings of names, "^" for all but these, "=" for no more."""
    here = [name for _, name in socket.if_nameindex()]
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        text = job.environment.get(variable)
        if not text:
            continue
        but, exact, names = re.fullmatch(r"(\^?)(=?)(.*)", text).groups()
        wanted = [name for name in names.split(",") if name]
        whole = bool(exact) or variable.startswith("GLOO")

        def matches(name: str, wanted: list[str] = wanted, whole: bool = whole) -> bool:
            return any(name == each if whole else name.startswith(each) for each in wanted)

        left = [name for name in here if matches(name) != bool(but)]
        if left:
            found.append(ok("interfaces", f"{variable}={text} is {', '.join(left)} here"))
        else:
            fix = f"Name one of {', '.join(here)} in {variable}, or unset it."
            found.append(fault("interfaces", f"{variable}={text} names no interface of this node", fix))
    return found


def adapters(job: Job) -> list[Finding]:
    text, here = job.environment.get("NCCL_IB_HCA"), _names(_INFINIBAND)
    if not text:
        return []
    but, exact, names = re.fullmatch(r"(\^?)(=?)(.*)", text).groups()
    wanted = [name.partition(":")[0] for name in names.split(",") if name]
    known = [
        name for name in here if any(name == each if exact else name.startswith(each) for each in wanted)
    ]
    if known or (but and here):
        return [ok("adapters", f"NCCL_IB_HCA={text}, of {', '.join(here)}")]
    fix = (
        f"Name one of {', '.join(here)} in NCCL_IB_HCA."
        if here
        else "Unset NCCL_IB_HCA, or use nodes with InfiniBand."
    )
    return [fault("adapters", f"NCCL_IB_HCA={text} names no adapter of this node", fix)]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
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
    if free < _LEAST_SHARED:
        fix = "Start the container with --shm-size=8g or --ipc=host, or remove what fills /dev/shm."
        return [fault("shared memory", f"{text}; NCCL and the data loaders need more", fix)]
    return [ok("shared memory", text)]


def open_files(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(_LEAST_FILES, 8 * job.world.size)
    if soft == resource.RLIM_INFINITY:
        return [ok("open files", "as many as a process likes")]
    if soft >= needed:
        return [ok("open files", f"{soft} of a process")]
    fix = f"Run `ulimit -n {max(65536, needed)}` before the job, or raise the limit of the container."
    if hard != resource.RLIM_INFINITY and hard < max(65536, needed):
        fix = (
            f"Run `ulimit -n {hard}` before the job."
            if hard >= needed
            else (
                "Raise the limit of what starts the job (LimitNOFILE of slurmd, --ulimit nofile of the container)."
            )
        )
    return [fault("open files", f"{soft} of a process, and a run of {job.world.size} needs {needed}", fix)]


def locked_memory(job: Job) -> list[Finding]:
    """What RDMA pins; nothing else here needs it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not job.first_on_node or not _names(_INFINIBAND):
        return []
    if soft != resource.RLIM_INFINITY:
        fix = "Run `ulimit -l unlimited` before the job, or start the container with --ulimit memlock=-1."
        return [fault("locked memory", f"{soft / 1e6:.3g} MB of a process, too little for InfiniBand", fix)]
    return [ok("locked memory", "as much as a process likes")]


CHECKS = (
    *(settings, secret, left_over, connections, interfaces, adapters),
    *(shared_memory, open_files, locked_memory),
)
