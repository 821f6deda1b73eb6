"""Measures the overhead of the link for a student that trains, on CPU, with a teacher as fast as the student.

    python benchmarks/link.py [--rounds 9] [--payloads float16 ...] [--json results.json] [--trace FOLDER]

A student process and a teacher process run on one core each. Both do the same work per micro-batch: the loss on
[tokens, vocab] bf16 logits, forward and backward, and matrix products in place of a model. This model is far smaller
than any in practice, so that the link has little time. The student alternates between answers that are ready in memory,
while the teacher is idle, and answers that the link delivers while the student trains. The ratio of the two step times
is the overhead of the link: the core time of encoding, sending and receiving, and every wait. Each round gives one
ratio; the table has their median and range.

The second part measures the link alone, alternating with plain sendall and recv_into of the same sizes, over TCP on the
loopback interface. No process computes, and both processes may use both cores. For float32, encoding is a copy.

--trace FOLDER: a few more steps under torch.profiler, as FOLDER/both.json. The exit status is 0 if every limit holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import link_sides
from link_sides import Work
from machine import installed, processor
from vcrd.link import merge_traces

PAYLOADS = ("float16", "float32", "logits_8bit", "topk", "hidden")
MOST_STEP_TIME = 1.10  # with the link, relative to answers in memory
# Relative to plain sockets. For float32, encoding is a copy.
LEAST_THROUGHPUT = {"float32": 0.85, "float16": 0.80, "logits_8bit": 0.70}
FLOW_BYTES = 256 << 20  # sent in each round of the throughput, at most FLOW_TIMES responses
FLOW_TIMES = 64
SECONDS = 300  # limit for one command


class Jobs:
    """Both processes, which receive the same commands."""

    def __init__(self, work: Work, cores: list[int]) -> None:
        # Spawned, not forked: each imports torch, as two jobs do.
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for side, core in zip((link_sides.Student, link_sides.Teacher), cores, strict=True):
            mine, theirs = context.Pipe()
            process = context.Process(target=link_sides.run, args=(side, work, core, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._answers()

    def both(self, *command) -> list:
        """The replies of student and teacher."""
        for pipe in self._pipes:
            pipe.send(command)
        return self._answers()

    def one(self, place: int, *command):
        self._pipes[place].send(command)
        return self._answer(place)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                pipe.send(None)
            except OSError:
                pass  # it has failed and printed its error
            process.join(10)
            process.kill()
            process.join()

    def _answers(self) -> list:
        return [self._answer(place) for place in range(len(self._pipes))]

    def _answer(self, place: int):
        name = ("student", "teacher")[place]
        if not self._pipes[place].poll(SECONDS):
            raise RuntimeError(f"the {name} did not answer within {SECONDS} seconds")
        try:
            return self._pipes[place].recv()
        except EOFError:
            raise RuntimeError(f"the {name} has failed; its error is above") from None


def steady(marks: list[float], credits: int) -> float:
    """Mean growth of the marks per step.

    Leaves out the first steps, before prefetching is in effect, and the last ones, which request nothing.
    """
    inner = marks[credits + 1 : -credits]
    return (inner[-1] - inner[0]) / (len(inner) - 1)


def overlap(jobs: Jobs, work: Work, payload: str, rounds: int, steps: int) -> dict:
    """Step times with answers in memory and with the link, alternating; seconds, one value per round."""
    jobs.both("prepare", payload)
    jobs.both("connect", payload)
    jobs.both("ready", payload, 2)
    jobs.both("linked", payload, 3, True)
    out: dict[str, list[float]] = {
        key: [] for key in ("ready", "linked", "waited", "student_cpu", "teacher_cpu")
    }
    for turn in range(rounds):
        got = {}
        for way in ("ready", "linked") if turn % 2 == 0 else ("linked", "ready"):
            got[way] = jobs.both(way, payload, steps, *([True] if way == "linked" else []))
            out[way].append(steady(got[way][0]["marks"], work.credits))
        out["waited"].append(steady(got["linked"][0]["waited"], work.credits))
        for place, key in enumerate(("student_cpu", "teacher_cpu")):
            out[key].append(got["linked"][place]["cpu"] - got["ready"][place]["cpu"])
    jobs.both("forget", payload)
    jobs.both("disconnect", payload)
    return out


def throughput(jobs: Jobs, work: Work, payload: str, rounds: int) -> dict:
    """Bytes per second of responses over the link and over plain sockets, alternating, one value per round."""
    size = work.bytes(payload)
    times = max(8, min(FLOW_TIMES, FLOW_BYTES // size))
    jobs.both("connect", payload)
    jobs.both("linked", payload, work.credits + 2, False)
    jobs.both("bare", size, 2)
    out: dict[str, list[float]] = {"bare": [], "linked": []}
    for turn in range(rounds):
        for way in ("bare", "linked") if turn % 2 == 0 else ("linked", "bare"):
            command = ("bare", size, times) if way == "bare" else ("linked", payload, times, False)
            out[way].append(size / steady(jobs.both(*command)[0]["marks"], work.credits))
    jobs.both("disconnect", payload)
    return out


def parameters(work: Work) -> float:
    """Parameters of a model whose training takes as many operations per token, 6 per parameter."""
    return work.matmuls * 2 * link_sides.SIDE**3 / (6 * work.tokens)


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def limits(overlaps: dict[str, dict], throughputs: dict[str, dict]) -> list[dict]:
    out = []
    for payload, of in overlaps.items():
        reached = median(ratios(of["linked"], of["ready"]))
        text = f"{payload}: step time / with ready answers <= {MOST_STEP_TIME:.2f}"
        out.append({"limit": text, "reached": reached, "passed": reached <= MOST_STEP_TIME})
    for payload, of in throughputs.items():
        if payload in LEAST_THROUGHPUT:
            reached, least = median(ratios(of["linked"], of["bare"])), LEAST_THROUGHPUT[payload]
            text = f"{payload}: bytes/s / plain sockets >= {least:.2f}"
            out.append({"limit": text, "reached": reached, "passed": reached >= least})
    return out


OVERLAP_HEADER = """
| payload | bytes | step, ready answers | step, link | ratio | range | waited | link's CPU, student | teacher |
|---|---|---|---|---|---|---|---|---|"""
THROUGHPUT_HEADER = """
| payload | bytes | link GB/s | bare GB/s | ratio | range |
|---|---|---|---|---|---|"""


def overlap_line(payload: str, size: int, of: dict) -> str:
    each = ratios(of["linked"], of["ready"])
    times = [f"{median(of[key]) * 1e3:.1f} ms" for key in ("ready", "linked")]
    costs = [f"{median(of[key]) * 1e3:.1f} ms" for key in ("waited", "student_cpu", "teacher_cpu")]
    cells = [
        payload,
        f"{size:,}",
        *times,
        f"{median(each):.3f}",
        f"{min(each):.3f} to {max(each):.3f}",
        *costs,
    ]
    return f"| {' | '.join(cells)} |"


def throughput_line(payload: str, size: int, of: dict) -> str:
    each = ratios(of["linked"], of["bare"])
    speeds = [f"{median(of[key]) / 1e9:.3f}" for key in ("linked", "bare")]
    cells = [payload, f"{size:,}", *speeds, f"{median(each):.2f}", f"{min(each):.2f} to {max(each):.2f}"]
    return f"| {' | '.join(cells)} |"


def traced(jobs: Jobs, work: Work, payload: str, steps: int) -> Path:
    """Writes the traces of both processes over a few steps, and a merged trace."""
    folder = work.trace_folder
    jobs.both("prepare", payload)
    jobs.both("connect", payload)
    jobs.both("linked", payload, 2, True)
    jobs.both("traced", payload, steps)
    jobs.both("forget", payload)
    jobs.both("disconnect", payload)
    merge_traces(folder / "both.json", [folder / "student.json", folder / "teacher.json"])
    return folder / "both.json"


def free_ports(names: list[str]) -> dict[str, int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in names]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--payloads", nargs="+", choices=PAYLOADS, default=list(PAYLOADS))
    parser.add_argument("--rounds", type=int, default=9, help="number of pairs of measurements")
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument(
        "--matmuls", type=int, default=12, help="products of 1024 x 1024 x 1024 in float32 per micro-batch"
    )
    parser.add_argument("--state-size", type=int, default=576, help="hidden: of a state")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--credits", type=int, default=2)
    parser.add_argument(
        "--sockets", type=int, default=1, help="number of connections, for the link and for plain sockets"
    )
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--trace", type=Path, help="folder for traces of a few steps")
    options = parser.parse_args(arguments)
    if options.steps < 2 * options.credits + 3:
        parser.error(f"--steps must be at least {2 * options.credits + 3}, got {options.steps}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("link.py: needs two cores, one for each process; only one is available", file=sys.stderr)
        return 2
    machine = {
        "processor": processor(),
        "cores": len(cores),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": [installed("torch")],
        "date": date.today().isoformat(),
    }
    print(
        f"{machine['processor']}, one core of {len(cores)} for each process; {', '.join(machine['packages'])}; "
        f"load {machine['load_before']:.1f}"
    )
    if machine["load_before"] > 0.5:
        print("Other processes use this machine, which changes all results.")
    sizes = {
        name: getattr(options, name)
        for name in ("tokens", "vocab", "matmuls", "state_size", "top_k", "credits", "sockets")
    }
    work = Work(**sizes, ports=free_ports(options.payloads), trace_folder=options.trace)
    jobs = Jobs(work, cores[:2])
    try:
        print(
            f"[{work.tokens}, {work.vocab}], a model of {parameters(work) / 1e6:.0f} million parameters, "
            f"{options.rounds} rounds of {options.steps} steps"
        )
        overlaps, throughputs = {}, {}
        print(OVERLAP_HEADER, flush=True)
        for payload in options.payloads:
            overlaps[payload] = overlap(jobs, work, payload, options.rounds, options.steps)
            print(overlap_line(payload, work.bytes(payload), overlaps[payload]), flush=True)
        if options.trace:
            written = traced(jobs, work, options.payloads[0], options.steps)
        jobs.both("free", cores)
        jobs.one(1, "bare_dial", jobs.one(0, "bare_listen"))
        jobs.one(0, "bare_accept")
        print(THROUGHPUT_HEADER, flush=True)
        for payload in options.payloads:
            throughputs[payload] = throughput(jobs, work, payload, options.rounds)
            print(throughput_line(payload, work.bytes(payload), throughputs[payload]), flush=True)
    finally:
        jobs.close()
    verdicts = limits(overlaps, throughputs)
    print()
    for one in verdicts:
        print(f"{'pass' if one['passed'] else 'FAIL'}  {one['limit']}, reached {one['reached']:.3f}")
    if options.trace:
        print(f"written: {written}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "machine": machine,
            "work": {**asdict(replace(work, trace_folder=None, ports={}))},
            "overlap": overlaps,
            "throughput": throughputs,
            "limits": verdicts,
        }
        options.json.write_text(json.dumps(record, indent=1))
        print(f"written: {options.json}")
    return 0 if all(one["passed"] for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
