"""How the link scales, on one machine: the rendezvous, the handshake and the plan of many ranks over loopback.

    PYTHONPATH=. python tests/link/scale.py --data 128 --tensor 8 --replicas 16

Student ranks are threads of a few processes, as nothing of them computes; teacher ranks are processes. Everyone joins,
every data rank asks once and every rank receives its answer; then one teacher replica is killed and comes back, and
every data rank asks again. Prints the seconds of each, and what student rank 0 and one teacher rank hold: memory, open
descriptors and threads of their processes, less those of a process that has not joined. Student rank 0 has a process of
its own. Exit status 1 unless everyone received every answer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # also in the processes that it starts, which import it by name
    sys.path.append(str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from link_jobs import Jobs, Layout
from ports import free_port

from vcrd.link import LinkSettings, StudentLink, TeacherLink, host_rendezvous

ROWS, PATIENCE = 4, 600.0


def held() -> dict[str, int]:
    """What this process holds."""
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return {
        "MB": memory,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def run_students(ranks: list[int], layout: Layout, settings: LinkSettings, rounds: int) -> None:
    """These ranks of the student, each in a thread. Waits before each round after the first for a file `go <round>`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    threading.stack_size(256 << 10)
    # Of hundreds of threads that wait for the interpreter, each would ask for it every 5 ms.
    sys.setswitchinterval(0.2)
    before = held()
    rendezvous = host_rendezvous(settings) if 0 in ranks else None
    together = threading.Barrier(len(ranks))

    def run(rank: int) -> None:
        say(rank, "up", 0.0)
        wait_for("join")
        begun = time.monotonic()
        link = StudentLink.connect(settings, **layout.student(rank))
        say(rank, "joined", time.monotonic() - begun)
        for number in range(rounds):
            wait_for(number)
            if link._place.is_request_leader:
                link.request(torch.zeros(1, ROWS, dtype=torch.int64))
            logits = link.receive(number).logits
            assert logits.shape == (ROWS, 1, link.columns.stop - link.columns.start) and (logits == 1.0).all()
            say(rank, f"received {number}", time.monotonic() - begun)
            if rank == 0 and number == rounds - 1:  # when nobody asks the rendezvous any more
                print("held", json.dumps(more(before, held())), flush=True)
        wait_for("end")
        together.wait()
        link.close()

    with ThreadPoolExecutor(len(ranks)) as pool:
        for each in [pool.submit(run, rank) for rank in ranks]:
            each.result()
    if rendezvous:
        rendezvous.close()


def say(rank: int, what: str, seconds: float) -> None:
    os.write(1, f"{what} {rank} {seconds:.2f}\n".encode())


def wait_for(what: object, folder: str | None = None) -> None:
    path = Path(folder or os.environ["VCRD_SCALE_FOLDER"]) / f"go {what}"
    while what != 0 and not path.exists():
        time.sleep(0.5)  # a thousand threads wait here


def in_folder(folder: str, target, *args) -> None:
    os.environ["VCRD_SCALE_FOLDER"] = folder
    target(*args)


def run_teacher(rank: int, replica: int, layout: Layout, settings: LinkSettings, folder: str) -> None:
    before = held()
    print("up", flush=True)
    wait_for("join", folder)
    link = TeacherLink.connect(
        settings, **layout.teacher(replica, rank), group=dist.group.WORLD, tensor_group=dist.group.WORLD
    )
    print("serves", flush=True)
    answered = 0
    while (batch := link.next_batch(8)) is not None:
        for request in batch:
            link.respond(request, torch.ones(ROWS, 1, layout.teacher_padded // layout.teacher_tensor))
            answered += 1
        if answered == len(range(replica, layout.student_data, layout.replicas)):
            print("held", json.dumps(more(before, held())), flush=True)
    link.close()


class Simulation:
    def __init__(self, jobs: Jobs, layout: Layout, processes: int, folder: Path) -> None:
        self.jobs, self.layout, self.folder = jobs, layout, folder
        self.settings = LinkSettings(
            address=f"127.0.0.1:{free_port()}",
            payload="float32",
            transport="tcp",
            **dict.fromkeys(("timeout", "connect_timeout"), PATIENCE),
        )
        others = list(range(1, layout.students))
        count = min(processes, len(others)) or 1
        self.ranks = [[0], *(others[index::count] for index in range(count) if others[index::count])]
        self.begun = time.monotonic()
        self.lives = 0

    def start_students(self, rounds: int) -> None:
        for index, ranks in enumerate(self.ranks):
            self.jobs.start(
                f"students{index}",
                in_folder,
                str(self.folder),
                run_students,
                ranks,
                self.layout,
                self.settings,
                rounds,
            )

    def start_teacher(self, replica: int) -> str:
        self.lives += 1
        name = f"teacher{replica}.{self.lives}."
        self.jobs.world(
            name,
            self.layout.teachers,
            run_teacher,
            replica,
            self.layout,
            self.settings,
            str(self.folder),
        )
        return name

    def go(self, what: object) -> None:
        (self.folder / f"go {what}").touch()

    def said(self, what: str) -> int:
        return sum(self.jobs.output(f"students{index}").count(what) for index in range(len(self.ranks)))

    def wait(self, what: str, seconds: float = PATIENCE) -> float:
        """Seconds until every student rank has said it."""
        begun = time.monotonic()
        while self.said(f"{what} ") < self.layout.students:
            for name, process in self.jobs.processes.items():
                assert process.exitcode in (None, 0), f"{name}: {self.jobs.output(name)[-3000:]}"
            assert time.monotonic() - begun < seconds, f"{self.said(what)} have said {what}"
            time.sleep(0.05)
        return time.monotonic() - begun

    def held_by(self, name: str) -> dict:
        (line, *_) = [each for each in self.jobs.output(name).splitlines() if each.startswith("held")]
        return json.loads(line.removeprefix("held "))


def simulate(layout: Layout, processes: int, folder: Path) -> dict:
    """Figures of one size."""
    with Jobs(folder) as jobs:
        simulation = Simulation(jobs, layout, processes, folder)
        simulation.start_students(2)
        names = [simulation.start_teacher(replica) for replica in range(layout.replicas)]
        simulation.wait("up")
        for name in names:
            for rank in range(layout.teachers):
                jobs.await_output(f"{name}{rank}", "up", PATIENCE)
        begun = time.monotonic()
        simulation.go("join")
        simulation.wait("joined")
        joined = time.monotonic() - begun
        simulation.wait("received 0")
        received = time.monotonic() - begun
        for rank in range(layout.teachers):
            jobs.signal(f"{names[0]}{rank}", signal.SIGKILL)
        for rank in range(layout.teachers):
            jobs.processes.pop(f"{names[0]}{rank}").join(10)
        begun = time.monotonic()
        again = simulation.start_teacher(0)
        jobs.await_output(f"{again}0", "serves", PATIENCE)
        rejoined = time.monotonic() - begun
        simulation.go(1)
        simulation.wait("received 1")
        simulation.go("end")
        student, teacher = simulation.held_by("students0"), simulation.held_by(f"{names[-1]}0")
        codes = jobs.wait(PATIENCE)
        assert not any(codes.values()), codes
    return {
        "student ranks": layout.students,
        "teacher ranks": layout.replicas * layout.teachers,
        "seconds until all joined": round(joined, 1),
        "seconds until all received": round(received, 1),
        "seconds until a replica was back": round(rejoined, 1),
        "student rank 0": student,
        "teacher rank": teacher,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=8, help="the student's data-parallel size")
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size of both jobs")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--processes", type=int, default=8, help="that hold the student's ranks but rank 0")
    given = parser.parse_args()
    layout = Layout(
        student_tensor=given.tensor,
        student_data=given.data,
        teacher_tensor=given.tensor,
        replicas=given.replicas,
        vocab=8 * given.tensor,
        sequence=ROWS,
    )
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(simulate(layout, given.processes, Path(folder)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
