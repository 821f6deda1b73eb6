"""Settings of the link, equal in both jobs except where a field says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from . import addresses
from .payload import payload_named

TRANSPORTS = ("auto", "nccl", "tcp", "fake")
IDENTITIES = ("check", "insist", "warn")


@dataclass(frozen=True)
class LinkSettings:
    """How a teacher job and a student job find each other, and what travels between them.

    address: "host:port" where rank 0 of the student's world hosts the rendezvous ("[::1]:port" for IPv6). It
        listens on that host's interface only. Or "file:/path" on a file system that both jobs share: rank 0 listens at
        a free port of `interface` and writes it there. A teacher that serves one student after another may have a
        pattern, "file:/path/*".
    interface: the name ("ib0") or the IP address of the interface that each student rank listens on. None: the one
        that routes to `address`; with a file, on rank 0, the one that leads outward. May differ by rank; the teacher's
        is not read.
    payload: what travels, with its bytes per position and the error of each; `payload` has the bounds. The logits:
        "float16" (of the distance from the row's maximum; 2 per column of the vocabulary) or "float32" (bit-exact; 4).
        "logits_8bit": one byte per column, the square root of that distance. "topk": the most probable tokens and the
        exact log of the mass of the rest (8 top_k + 4). "hidden": the teacher's last hidden states as they are (their
        size times that of their dtype); the student holds the teacher's output layer, sent once.
    top_k: tokens per position that "topk" carries; at most the vocabulary. Equal in both jobs.
    transport: how tensors travel. "auto": over NCCL from GPU to GPU where both jobs can and a probe of every pair of
        ranks succeeds, else over TCP through pinned host memory, with a warning that says why. "nccl": over NCCL, or
        not at all. "tcp": without a look at NCCL. "fake": the code of "nccl" on the CPU over a stand-in that checks
        NCCL's rules, for tests. The jobs may differ in it: a job that says "nccl" or "tcp" decides for one that says
        "auto". Requests, and all that keeps the two jobs together, are TCP in any case.
    sockets: TCP connections between a teacher rank and a student rank, 1 to 16. Tensors of 8 MB and more are divided
        among those that get 4 MB each. The teacher's setting counts.
    nccl_max_ctas: blocks that each NCCL kernel of the link may take of its GPU, 1 to 32. The variable NCCL_MAX_CTAS
        comes before it.
    credits: micro-batches that the teacher may hold or have answered ahead of the one in use, per student
        replica. Bounds memory on both sides. The student's setting counts.
    timeout: seconds without a sign of life while an answer is waited for (student), or without an answer being
        taken (teacher), after which the other side counts as lost. Idle time is never counted.
    connect_timeout: seconds to wait for the other job when connecting.
    rejoin_timeout: seconds to wait for a lost teacher (student) or a lost student (teacher) to come back.
    name: name of the run; two links at one address need two names.
    max_tokens: tokens in the largest micro-batch, b times s; a header that says more is refused before
        anything is allocated.
    identity: what becomes of a teacher whose tokenizer gives other tokens to the same ids than the student's, or whose
        weights are not those of the run's first teacher: one that comes back, or another replica. "check": it is
        refused. "insist": also one where either cannot be compared, because a job does not state it. "warn": it is let
        in, with a warning. The student's setting counts.
    secret: when set, only who knows it can join. secret_file: where to read it from; its owner alone should be
        able to.
    """

    address: str = "127.0.0.1:29600"
    interface: str | None = None
    payload: str = "float16"
    top_k: int = 64
    transport: str = "auto"
    sockets: int = 1
    nccl_max_ctas: int = 2
    credits: int = 2
    timeout: float = 600.0
    connect_timeout: float = 600.0
    rejoin_timeout: float = 600.0
    name: str = "vcrd"
    max_tokens: int = 1 << 20
    identity: str = "check"
    secret: str = field(default="", repr=False)
    secret_file: str | PathLike | None = None

    def __post_init__(self) -> None:
        _check_texts(self)
        addresses.check(self.address)
        payload_named(self.payload)
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.identity not in IDENTITIES:
            raise ValueError(f"identity must be one of {', '.join(IDENTITIES)}, got {self.identity!r}")
        for name in ("credits", "max_tokens", "top_k", "sockets", "nccl_max_ctas"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, most in (("sockets", 16), ("nccl_max_ctas", 32)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        for name in ("timeout", "connect_timeout", "rejoin_timeout"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be a non-empty text without '/', got {self.name!r}")
        if self.secret and self.secret_file:
            raise ValueError("secret_file must be None where secret is given, got both")

    def shared_secret(self) -> str:
        """The secret, from its file where one is named; ValueError if that cannot be read or is empty."""
        if self.secret_file is None:
            return self.secret
        try:
            text = Path(self.secret_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"secret_file must be readable, got {self.secret_file!r}: {error}") from None
        if not text:
            raise ValueError(f"secret_file must hold a secret, got an empty file {self.secret_file!r}")
        return text


def _check_texts(settings: LinkSettings) -> None:
    optional = {"interface": str, "secret_file": (str, PathLike)}
    texts = dict.fromkeys(("address", "payload", "transport", "name", "identity", "secret"), str)
    for name, kind in {**texts, **optional}.items():
        value = getattr(settings, name)
        if not isinstance(value, kind) and not (name in optional and value is None):
            raise ValueError(
                f"{name} must be a text{' or None' if name in optional else ''}, got {type(value).__name__}"
            )
