"""What the processes of a run find each other by: names, addresses, interfaces, ports."""

from __future__ import annotations

import socket
from contextlib import closing

from vcrd.doctor.findings import Finding, fact, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job
from vcrd.link import addresses
from vcrd.link.errors import LinkError
from vcrd.link.rendezvous import listen, local_host
from vcrd.link.transport import cuda


def own_address(job: Job) -> str:
    """The IP address that a student rank would listen on; LinkError where it has none."""
    if job.link.interface is not None:
        return local_host(job.link)
    if not job.link.address.startswith(addresses.SCHEME):
        (place,) = addresses.candidates(job.link.address)
        if not _loopback(place[0]):
            return local_host(job.link)
    return addresses.outward_address() if job.world.size > 1 and not _alone(job) else "127.0.0.1"


def nccl_version() -> tuple[str, str]:
    """Of NCCL as the link would use it here, or "" and why it would not."""
    import torch

    if not torch.cuda.is_available():
        return "", "torch reaches no GPU"
    try:
        number = cuda.version()
    except ImportError as error:
        return "", str(error)
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}", ""


def transport(job: Job) -> list[Finding]:
    """How tensors would travel from this process; whether a pair of GPUs connects shows when the jobs join."""
    setting = job.link.transport
    if setting not in ("auto", "nccl"):
        return [fact("transport", f"{setting}, as VCRD_TRANSPORT says")]
    version, why = nccl_version()
    if version:
        return [ok("transport", f"NCCL {version}, GPU to GPU, if the other job has it too")]
    if setting == "nccl":
        fix = "Run `pip install 'vcrd[nccl]'`, give the process a GPU, or set VCRD_TRANSPORT=auto."
        return [fault("transport", f"VCRD_TRANSPORT is nccl, and {why}", fix)]
    return [fact("transport", f"TCP: {why}")]


def _alone(job: Job) -> bool:
    """Whether all processes are on one node, as far as the launcher says."""
    return len(job.world.expected) == 1 or job.world.local_size == job.world.size


def host_name(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        text, fix = f"{name} cannot be resolved: {first_line(error)}", f"Add {name} to DNS or to /etc/hosts."
        return [fault("host name", text, fix) if job.world.size > 1 else fact("host name", text)]
    chosen = job.environment.get("GLOO_SOCKET_IFNAME")
    if _loopback(address) and not _alone(job) and not chosen:
        return [
            fault(
                "host name",
                f"{name} is {address}, where no other node finds it",
                "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the network, or correct /etc/hosts.",
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
        # Which names those of the interfaces that have an address.
        fix = "Name one of these in VCRD_INTERFACE, or unset it."
        return [fault("link interface", f"VCRD_INTERFACE={name}: {error}", fix)]
    return [ok("link interface", f"VCRD_INTERFACE={name} is {address} here")]


def address(job: Job) -> list[Finding]:
    """Where the student's rank 0 will listen: free here, if it is here."""
    if not job.first_on_node:
        return []
    if "VCRD_ADDRESS" not in job.environment and not _alone(job):
        text = f"VCRD_ADDRESS is not set; the default, {job.link.address}, is for jobs on one machine"
        return [unchecked("address", text)]
    return [_address(job)]


def _address(job: Job) -> Finding:
    given = job.link.address
    label = f"VCRD_ADDRESS={given}" if "VCRD_ADDRESS" in job.environment else f"the default, {given},"
    if given.startswith(addresses.SCHEME):
        return ok("address", f"{label}, written by the student when it runs")
    ((host, port),) = addresses.candidates(given)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        text = f"{label}: {host} cannot be resolved ({first_line(error)})"
        return fault(
            "address", text, "Name in VCRD_ADDRESS a host that all nodes resolve, or its IP address."
        )
    if _loopback(found) and not _alone(job):
        return fault(
            "address",
            f"{label} is {found}, where no other node finds it",
            "Set VCRD_ADDRESS to host:port of the student's first node, or to file:/path on a shared file system.",
        )
    if not _is_ours(found):
        return unchecked("address", f"{label} is of another machine")
    if job.during_run:
        return unchecked("address", f"a run has {label}")
    try:
        with closing(listen(host, port)):
            return ok("address", f"{label} is free")
    except LinkError as error:
        return fault(
            "address",
            str(error),
            f"End what listens there (`ss -ltnp 'sport = :{port}'` names it), or choose another port in VCRD_ADDRESS.",
        )


def ports(job: Job) -> list[Finding]:
    if not job.first_on_node:
        return []
    wanted = list(job.ports)
    # Alone, because otherwise the doctor itself listens there.
    given = job.environment.get("MASTER_PORT", "")
    if job.world.size == 1 and given.isascii() and given.isdigit() and 0 < int(given) < 65536:
        wanted.append(int(given))
    taken, free = [], []
    for port in dict.fromkeys(wanted):
        try:
            with closing(listen("0.0.0.0", port)):
                free.append(str(port))
        except LinkError:
            taken.append(
                fault(
                    "ports",
                    f"port {port} is taken",
                    f"End what listens there (`ss -ltnp 'sport = :{port}'` names it), or choose another.",
                )
            )
    return [*taken, *([ok("ports", f"{', '.join(free)} free")] if free else [])]


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1", "[::1]")


CHECKS = (host_name, link_interface, address, ports, transport)
