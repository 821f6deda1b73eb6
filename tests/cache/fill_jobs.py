"""A teacher job without Megatron whose answers are known, for the tests of filling a cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from link_jobs import Layout, true_logits
from torch import Tensor
from waiting import wait_until

from vcrd.cache.files import Cache
from vcrd.link import Head, Identity, LinkSettings, Request, Span, TeacherLink
from vcrd.link.errors import StudentLost
from vcrd.settings import DistillSettings

SIZE = 6  # hidden size
HEAD = Head(SIZE, "bfloat16", scale=0.5)
LAYOUT = Layout(teacher_tensor=2, vocab=50, sequence=16)
WEIGHTS = 7


def settings(port: int, payload: str = "float16", **changes) -> DistillSettings:
    own = DistillSettings(vocab_size=LAYOUT.vocab, sequence_length=LAYOUT.sequence)
    address = f"127.0.0.1:{port}"
    return own.replaced(payload=payload, top_k=4, address=address, connect_timeout=60, timeout=60, **changes)


def states(tokens: Tensor) -> Tensor:
    """Hidden states [s, b, size] about tokens [b, s]."""
    return true_logits(tokens, SIZE).bfloat16()


def output_layer() -> Tensor:
    return torch.randn(LAYOUT.vocab, SIZE, generator=torch.Generator().manual_seed(3)).bfloat16()


def teach(
    rank: int,
    link: LinkSettings,
    log: str,
    weights: int = WEIGHTS,
    answers: int = 1 << 30,
    stay: bool = False,
) -> None:
    """One of the two ranks of a teacher. log: a file that gets a line for each request. answers: after that many it
    waits for the file `log`.go. stay: serves one student after another until the process is ended."""
    hidden, answered = link.payload == "hidden", 0
    head, shard = output_layer(), slice(25 * rank, 25 * rank + 25)
    while True:
        try:
            teacher = TeacherLink.connect(
                link,
                **LAYOUT.teacher(0, rank),
                group=dist.group.WORLD,
                tensor_group=dist.group.WORLD,
                head=HEAD if hidden else None,
                head_weight=head[shard] if hidden else None,
                device="cpu",
                identity=Identity(None, weights if rank == 0 else 0, "teacher of the tests"),
            )
            while (requests := teacher.next_batch(2)) is not None:
                for request in requests:
                    if answered >= answers:
                        wait_until(Path(f"{log}.go").exists, 60, "the teacher may go on")
                    answered += 1
                    note(rank, log, request)
                    output = states(request.tokens) if hidden else true_logits(request.tokens, 50)[..., shard]
                    teacher.respond(request, output)
            teacher.close()
        except StudentLost:
            if not stay:
                raise
        if not stay:
            return


def note(rank: int, log: str, request: Request) -> None:
    if rank == 0:
        with open(log, "a") as file:
            file.write(f"{request.data_rank} {request.tokens.shape[0]} {request.tokens.tolist()}\n")


def asked(log: Path) -> list[str]:
    """The requests that a teacher has answered."""
    return log.read_text().splitlines() if log.exists() else []


def samples(count: int, seed: int = 0, length: int = 16) -> Tensor:
    return torch.randint(LAYOUT.vocab, (count, length), generator=torch.Generator().manual_seed(seed))


def read(cache: Cache, key: bytes) -> list[Tensor]:
    rows = cache.rows_of(key)
    out = [tensor.squeeze(1) for tensor in cache.header.content().blank(rows, 1, LAYOUT.vocab)]
    cache.read(key, [Span(0, rows)], Span(0, LAYOUT.vocab), out)
    return out


def environment(port: int, payload: str, **more: str) -> dict[str, str]:
    """For `python -m vcrd cache --write`."""
    return {
        "VCRD_ADDRESS": f"127.0.0.1:{port}",
        "VCRD_PAYLOAD": payload,
        "VCRD_TOP_K": "4",
        "VCRD_VOCAB_SIZE": str(LAYOUT.vocab),
        "VCRD_SEQUENCE_LENGTH": str(LAYOUT.sequence),
        "VCRD_CONNECT_TIMEOUT": "60",
        **more,
    }


def run(arguments: list[str], variables: dict[str, str]) -> None:
    """`python -m vcrd` in this process, which a test has made for it."""
    from vcrd.__main__ import main

    for name in [name for name in os.environ if name.startswith("VCRD_")]:
        del os.environ[name]
    os.environ.update(variables)
    print("status", main(arguments))
