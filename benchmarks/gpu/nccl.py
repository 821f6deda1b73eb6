"""Tests NCCL between processes that share one GPU, and measures the speed of the link over it.

    python -m benchmarks.gpu.nccl ranks [--json ranks.json]
    python -m benchmarks.gpu.nccl speed [--megabytes 8 64 256] [--json speed.json]

The processes use sockets of the loopback interface (ranks.py). This is the path between nodes without GPUDirect. So
the figures show the overhead of the link over NCCL, not the speed of NVLink or InfiniBand.

ranks: torch's all-reduce, send and receive between two processes; the exit status is 1 if a value is wrong.
speed: alternates between plain ncclSend and ncclRecv of one tensor, the link over NCCL and the link over TCP, with the
same number of bytes, from a teacher process to a student process. Also measures how much each of them slows matrix
products of the student.

`--transport fake --device cpu` runs the script without a GPU; its figures then have no meaning.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.gpu.ranks import run_together

VOCAB = 32768
ROUNDS, WARMUPS = 5, 2
SECONDS = 80  # limit for both processes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ranks", "speed"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--transport", default="nccl", choices=["nccl", "fake"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help="this is one of the two processes")
    parser.add_argument("--folder", type=Path, help="folder through which the two processes connect")
    given = parser.parse_args()
    if given.rank is not None:
        figures = {"ranks": ranks, "speed": speed}[given.what](given)
        (given.folder / f"figures{given.rank}.json").write_text(json.dumps(figures))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = both(folder)
    if figures is None:
        return 1
    print(json.dumps(figures, indent=2))
    if given.json:
        given.json.write_text(json.dumps(figures))
    return 0


def both(folder: str) -> dict | None:
    """The result of rank 0, or None if a process failed."""
    given = ["-m", "benchmarks.gpu.nccl", *sys.argv[1:], "--folder", folder]
    error = run_together({f"rank{rank}": [*given, "--rank", str(rank)] for rank in range(2)}, SECONDS)
    if error:
        print(error, file=sys.stderr)
        return None
    return json.loads((Path(folder) / "figures0.json").read_text())


def ranks(given: argparse.Namespace) -> dict:
    import torch
    import torch.distributed as dist

    device = torch.device(given.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{given.folder}/store", rank=given.rank, world_size=2
    )
    values = torch.arange(1 << 20, dtype=torch.float32, device=device) * (given.rank + 1)
    dist.all_reduce(values)
    assert torch.equal(values.cpu(), 3 * torch.arange(1 << 20, dtype=torch.float32)), "all_reduce"
    payload = torch.full((1 << 22,), float(given.rank), device=device)
    if given.rank == 0:
        dist.send(payload, 1)
    else:
        dist.recv(payload, 0)
        assert not payload.any(), "send and receive"
    dist.barrier()
    dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else "gloo"
    return {"nccl": version, "all_reduce": "right", "send and receive": "right"}


def speed(given: argparse.Namespace) -> dict:
    """Rank 0 is the student, rank 1 the teacher; files synchronise their phases."""
    import torch

    device = torch.device(given.device)
    products = Products(device)
    found: dict = {"transport": given.transport, "sizes": {}}
    alone = median(products.per_second(0.3) for _ in range(3)) if given.rank == 0 else 0.0
    for megabytes in given.megabytes:
        rows = (megabytes << 20) // (2 * VOCAB)
        size: dict = {}
        for name in ("bare", given.transport, "tcp"):
            ends = Bare(given, device, rows) if name == "bare" else Linked(given, device, rows, name)
            size[name] = measured(given, ends, rows, products, alone)
        found["sizes"][f"{megabytes} MB"] = size
        if given.rank == 0:
            print(f"{megabytes} MB: {size}", file=sys.stderr, flush=True)
    return found


class Products:
    """Matrix products in place of training, and their number per second."""

    def __init__(self, device) -> None:
        import torch

        side = 4096 if device.type == "cuda" else 256
        self._torch, self._device = torch, device
        self._matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)

    def per_second(self, seconds: float, while_running: Callable[[], bool] = lambda: True) -> float:
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds and while_running():
            for _ in range(10):
                self._matrix @ self._matrix
            if self._device.type == "cuda":
                self._torch.cuda.synchronize(self._device)
            count += 10
        return count / (time.perf_counter() - begun)


def measured(given, ends: Bare | Linked, rows: int, products: Products, alone: float) -> dict:
    """GB/s, the median over the rounds, and the share of the speed of the products during the transfers."""
    size, times = 2 * rows * VOCAB, max(4, min(40, (256 << 20) // (2 * rows * VOCAB)))
    speeds, left = [], []
    try:
        for turn in range(given.rounds + WARMUPS):
            begun = time.perf_counter()
            ends.move(times)
            if turn >= WARMUPS:
                speeds.append(size * times / (time.perf_counter() - begun) / 1e9)
        for _ in range(3):
            moving = threading.Thread(target=ends.move, args=(times,))
            moving.start()
            if given.rank == 0:
                left.append(products.per_second(60, moving.is_alive) / alone)
            moving.join()
    finally:
        ends.close()
    if given.rank == 1:
        return {}
    return {"GB/s": round(median(speeds), 3), "products beside it": round(median(left), 3)}


class Bare:
    """Repeated ncclSend and ncclRecv of one tensor, on a communicator from the code of the link."""

    def __init__(self, given, device, rows: int) -> None:
        import torch

        self._sends = given.rank == 1
        self._owner = ThreadPoolExecutor(1)  # the thread that uses the communicator
        self._tensor = torch.zeros(rows, VOCAB, dtype=torch.float16, device=device)
        self._owner.submit(self._open, given, device, given.folder / f"bare{rows}").result()

    def _open(self, given, device, place: Path) -> None:
        from vcrd.link.connection import Connection
        from vcrd.link.transport.opening import Endpoint, Receiver, Sender

        endpoint = Endpoint(given.transport, device)
        if self._sends:
            with socket.create_server(("127.0.0.1", 0)) as server:
                write(place, str(server.getsockname()[1]))
                self._end = Sender(Connection(server.accept()[0]), endpoint)
            why = self._end.open(given.transport)
            if why:
                raise RuntimeError(why)
        else:
            port = int(read(place))
            self._end = Receiver(Connection(socket.create_connection(("127.0.0.1", port))), endpoint)
            self._end.switch(self._end.connection.receive_header())

    def move(self, times: int) -> None:
        self._owner.submit(self._move, times).result()

    def _move(self, times: int) -> None:
        transport = self._end.transport
        communicator = transport._communicator
        call = communicator.send if self._sends else communicator.receive
        for _ in range(times):
            transport._transfer(call, self._tensor, transport._wait)
        transport._wait(transport._stream.record().done)

    def close(self) -> None:
        if self._sends:  # the transfer may still be running
            self._end.connection.readable(SECONDS)
        self._owner.submit(self._end.close).result()
        self._owner.shutdown()


class Linked:
    """The link between one rank and one rank, payload float16."""

    def __init__(self, given, device, rows: int, transport: str) -> None:
        import torch

        from vcrd.link import LinkSettings, StudentLink, TeacherLink, TeacherPlace, host_rendezvous

        self._torch, self._rows, self._student = torch, rows, given.rank == 0
        settings = LinkSettings(
            address=f"file:{given.folder}/{transport}{rows}",
            transport=transport,
            name=f"{transport}{rows}",
            timeout=60,
        )
        sizes = dict(vocab_size=VOCAB, padded_vocab_size=VOCAB, sequence_length=rows)
        rank = dict(tensor_rank=0, tensor_size=1)
        if self._student:
            self._rendezvous = host_rendezvous(settings)
            self._link = StudentLink.connect(
                settings, **sizes, **rank, data_rank=0, data_size=1, device=device
            )
            self._tokens = torch.zeros(1, rows, dtype=torch.int64)
            self._number = 0
            return
        self._logits = torch.randn(rows, 1, VOCAB, device=device).bfloat16()
        self._link = TeacherLink.connect(
            settings,
            **sizes,
            place=TeacherPlace(),
            group=None,
            tensor_group=None,
            device=device,
        )

    def move(self, times: int) -> None:
        if not self._student:
            for _ in range(times):
                (request,) = self._link.next_batch(1)
                self._link.respond(request, self._logits)
            return
        first, self._number = self._number, self._number + times
        asked = first
        for number in range(first, first + times):
            while asked < min(number + 2, first + times):
                self._link.request(self._tokens)
                asked += 1
            self._link.receive(number)

    def close(self) -> None:
        if self._student:
            self._link.close()
            self._rendezvous.close()
            return
        assert self._link.next_batch(1) is None
        self._link.close()


def write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


def read(path: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the other process has not written {path.name}")
        time.sleep(0.01)
    return path.read_text()


if __name__ == "__main__":
    sys.exit(main())
