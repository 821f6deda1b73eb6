"""Settings of the link, equal in both jobs except where a field says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from .payload import payload_named


@dataclass(frozen=True)
class LinkSettings:
    """How a teacher job and a student job find each other, and what travels between them.

    address: "host:port" where rank 0 of the student's world hosts the store ("[::1]:port" for IPv6). The
        store listens on that host's interface only, and each rank binds its sockets to the local interface
        that routes there.
    payload: "float16" (of the distance from the row's maximum), "logits_8bit" (one byte of its square root) or
        "float32" (bit-exact).
    credits: micro-batches that the teacher may hold or have answered ahead of the one in use, per student
        replica. Bounds memory on both sides. The student's setting counts.
    timeout: seconds without an answer to an outstanding request (student), or without an answer being taken
        (teacher), after which the other side counts as lost. Idle time is never counted.
    connect_timeout: seconds to wait for the other job when connecting.
    name: name of the run; two links on one store need two names.
    max_tokens: tokens in the largest micro-batch, b times s; a header that says more is refused before
        anything is allocated.
    """

    address: str = "127.0.0.1:29600"
    payload: str = "float16"
    credits: int = 2
    timeout: float = 600.0
    connect_timeout: float = 600.0
    name: str = "vcrd"
    max_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"address must be 'host:port' with a port from 1 to 65535, got {self.address!r}")
        payload_named(self.payload)
        for field in ("credits", "max_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be an integer of at least 1, got {value!r}")
        for field in ("timeout", "connect_timeout"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(
                    f"{field} must be a positive number of seconds, got {getattr(self, field)!r}"
                )
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be a non-empty text without '/', got {self.name!r}")

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])
