"""How the processes of a run reach each other: host names, addresses, interfaces, ports, and the transport."""

from __future__ import annotations

import re
import socket
from contextlib import closing

from vcrd.doctor.checks import Job
from vcrd.doctor.environment import infiniband_adapters
from vcrd.doctor.findings import Finding, first_line, info, ok, problem, unchecked
from vcrd.link.errors import LinkError
from vcrd.link.rendezvous import candidates, listen, local_host, outward_address
from vcrd.link.transport import nccl
from vcrd.settings import FILE_SCHEME


def host_name(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        text, fix = f"{name} cannot be resolved: {first_line(error)}", f"Add {name} to DNS or to /etc/hosts."
        return [problem("host name", text, fix) if job.world.size > 1 else info("host name", text)]
    chosen = job.environment.get("GLOO_SOCKET_IFNAME")
    if _is_loopback(address) and not job.on_one_node and not chosen:
        return [
            problem(
                "host name",
                f"{name} is {address}, which other nodes cannot reach",
                "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface, or correct /etc/hosts.",
            )
        ]
    return [ok("host name", f"{name} is {address}")]


def link_interface(job: Job) -> list[Finding]:
    name = job.link.interface
    if name is None:
        return []
    try:
        address = local_host(job.link)
        with closing(listen(address, 0)):
            pass
    except LinkError as error:
        # The message lists the interfaces that have an address.
        fix = "Set VCRD_INTERFACE to one of these, or unset it."
        return [problem("link interface", f"VCRD_INTERFACE={name}: {error}", fix)]
    return [ok("link interface", f"VCRD_INTERFACE={name} is {address} here")]


def interfaces(job: Job) -> list[Finding]:
    """The interfaces for NCCL and gloo: prefixes for NCCL, exact names for gloo and after "=". A "^" excludes them."""
    here = [name for _, name in socket.if_nameindex()]
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        text = job.environment.get(variable)
        if not text:
            continue
        exclude, exact, names = re.fullmatch(r"(\^?)(=?)(.*)", text).groups()
        wanted = [name for name in names.split(",") if name]
        whole = bool(exact) or variable.startswith("GLOO")

        def matches(name: str, wanted: list[str] = wanted, whole: bool = whole) -> bool:
            return any(name == each if whole else name.startswith(each) for each in wanted)

        used = [name for name in here if matches(name) != bool(exclude)]
        if used:
            found.append(ok("interfaces", f"{variable}={text} is {', '.join(used)} here"))
        else:
            fix = f"Set {variable} to one of {', '.join(here)}, or unset it."
            found.append(problem("interfaces", f"{variable}={text} matches no interface of this node", fix))
    return found


def adapters(job: Job) -> list[Finding]:
    text, here = job.environment.get("NCCL_IB_HCA"), infiniband_adapters()
    if not text:
        return []
    exclude, exact, names = re.fullmatch(r"(\^?)(=?)(.*)", text).groups()
    wanted = [name.partition(":")[0] for name in names.split(",") if name]
    known = [
        name for name in here if any(name == each if exact else name.startswith(each) for each in wanted)
    ]
    if known or (exclude and here):
        return [ok("adapters", f"NCCL_IB_HCA={text}; this node has {', '.join(here)}")]
    fix = "Unset NCCL_IB_HCA, or use nodes with InfiniBand."
    if here:
        fix = f"Set NCCL_IB_HCA to one of {', '.join(here)}."
    return [problem("adapters", f"NCCL_IB_HCA={text} matches no adapter of this node", fix)]


def address(job: Job) -> list[Finding]:
    """Where rank 0 of the student will listen, for each teacher job. On this node, its port must be free."""
    if not job.first_on_node:
        return []
    if "VCRD_ADDRESS" not in job.environment and not job.on_one_node:
        if job.link.teacher is not None:
            return []
        text = f"VCRD_ADDRESS is not set; its default, {job.link.rendezvous}, is for jobs on one machine"
        return [unchecked("address", text)]
    return [
        _address(job, each.name, each.address) for each in job.link.teachers() if each.address is not None
    ]


def _address(job: Job, teacher: str, given: str) -> Finding:
    label = f"VCRD_ADDRESS={given}" if "VCRD_ADDRESS" in job.environment else f"the default address {given}"
    if teacher:
        label = f"VCRD_ADDRESS={given} of the teacher {teacher}"
    if given.startswith(FILE_SCHEME):
        return ok("address", f"{label}, a file that the student writes when it starts")
    ((host, port),) = candidates(given)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        text = f"{label}: {host} cannot be resolved ({first_line(error)})"
        return problem(
            "address",
            text,
            "Set VCRD_ADDRESS to a host name that all nodes can resolve, or to an IP address.",
        )
    if _is_loopback(found) and not job.on_one_node:
        return problem(
            "address",
            f"{label} is {found}, which other nodes cannot reach",
            "Set VCRD_ADDRESS to host:port of the first student node, or to file:/path on a shared file system.",
        )
    if not _is_local(found):
        return unchecked("address", f"{label} belongs to another machine")
    if job.options.during_run:
        return unchecked("address", f"a run is using {label}")
    try:
        with closing(listen(host, port)):
            return ok("address", f"{label} is free")
    except LinkError as error:
        return problem(
            "address",
            str(error),
            f"End the process that listens there (`ss -ltnp 'sport = :{port}'`), or change the port in VCRD_ADDRESS.",
        )


def ports(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    wanted = list(job.options.ports)
    # With several processes, the doctor itself listens at MASTER_PORT.
    given = job.environment.get("MASTER_PORT", "")
    if job.world.size == 1 and given.isascii() and given.isdigit() and 0 < int(given) < 65536:
        wanted.append(int(given))
    used, free = [], []
    for port in dict.fromkeys(wanted):
        try:
            with closing(listen("0.0.0.0", port)):
                free.append(str(port))
        except LinkError:
            used.append(
                problem(
                    "ports",
                    f"port {port} is in use",
                    f"End the process that listens there (`ss -ltnp 'sport = :{port}'`), or choose another port.",
                )
            )
    return [*used, *([ok("ports", f"{', '.join(free)} free")] if free else [])]


def transport(job: Job) -> list[Finding]:
    """The transport that this process would use. Whether two GPUs can connect shows only when the jobs connect."""
    setting = job.link.transport
    if setting not in ("auto", "nccl"):
        return [info("transport", f"{setting}, as set in VCRD_TRANSPORT")]
    version, why = nccl_version()
    if version:
        return [ok("transport", f"NCCL {version} from GPU to GPU, if the other job has it too")]
    if setting == "nccl":
        fix = "Run `pip install 'vcrd[nccl]'`, give the process a GPU, or set VCRD_TRANSPORT=auto."
        return [problem("transport", f"VCRD_TRANSPORT is nccl, but {why}", fix)]
    return [info("transport", f"TCP: {why}")]


def own_address(job: Job) -> str:
    """The IP address that a student rank would listen on; LinkError if there is none."""
    if job.link.interface is not None:
        return local_host(job.link)
    link = job.first
    if link.address is not None and not link.address.startswith(FILE_SCHEME):
        (place,) = candidates(link.address)
        if not _is_loopback(place[0]):
            return local_host(link)
    return outward_address() if job.world.size > 1 and not job.on_one_node else "127.0.0.1"


def nccl_version() -> tuple[str, str]:
    """The version of NCCL that the link would use here; or "" and why it would not use NCCL."""
    import torch

    if not torch.cuda.is_available():
        return "", "torch finds no GPU"
    try:
        number = nccl.version()
    except ImportError as error:
        return "", str(error)
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}", ""


def _is_local(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1", "[::1]")


CHECKS = (host_name, interfaces, adapters, link_interface, address, ports, transport)
