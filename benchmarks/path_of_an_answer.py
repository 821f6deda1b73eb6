"""Lists the functions of vcrd that the teacher's answer to one micro-batch passes through, from `TeacherLink.respond`
to the gradient of the student's logits.

    python benchmarks/path_of_an_answer.py [--payload float16] [--transport tcp] [--json path.json]

A teacher process and a student process are linked on the CPU, as two jobs are. Each has a profile function
(`sys.setprofile` and `threading.setprofile`) that notes every call of a Python function of vcrd, with its thread and
its time. The first micro-batch warms both processes up. The second one is recorded: in the teacher from the call of
`respond`, in the student from the call of `receive` until the backward of `validity_calibrated_kl` has ended. The
student is already waiting when the teacher responds.

The list is in the order of the first calls, on one clock. A function that two threads call is listed for each of them
and counted once. Properties and lambdas count as functions. Functions that run since before the recording do not show.
Calls into C++ and torch are not listed, and neither are comprehensions: they belong to the function around them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import torch

import vcrd
from vcrd.link import Head, LinkSettings, StudentLink, TeacherLink, TeacherPlace, host_rendezvous

ROOT = Path(__file__).resolve().parent.parent
TOKENS, VOCAB, STATE_SIZE = 64, 512, 16
MODEL_SECONDS = 0.3  # the time of the teacher's model: the student waits when the teacher responds
SECONDS = 120  # that one process may take
PACKAGE = str(ROOT / "vcrd")
PARTS_OF_FUNCTIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>")


class Recorder:
    """A profile function. calls: by process, thread, file and function, when it was called first."""

    def __init__(self, process: str) -> None:
        self.on = False
        self.calls: dict[tuple[str, str, str, str], float] = {}
        self._process = process
        threading.setprofile(self)
        sys.setprofile(self)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not self.on or event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        name = getattr(code, "co_qualname", code.co_name)
        if name.endswith(PARTS_OF_FUNCTIONS):
            return
        file = str(Path(code.co_filename).relative_to(ROOT))
        key = (self._process, threading.current_thread().name, file, name)
        self.calls.setdefault(key, time.monotonic())


def settings(options: argparse.Namespace, port: int) -> LinkSettings:
    return LinkSettings(
        address=f"127.0.0.1:{port}",
        payload=options.payload,
        transport=options.transport,
        top_k=8,
        connect_timeout=SECONDS,
    )


def student(options: argparse.Namespace, port: int, pipe: Connection) -> None:
    recorder = Recorder("student")
    rendezvous = host_rendezvous(settings(options, port))
    link = StudentLink.connect(
        settings(options, port),
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        sequence_length=TOKENS,
        tensor_rank=0,
        tensor_size=1,
        data_rank=0,
        data_size=1,
    )
    tokens = torch.randint(VOCAB, (1, TOKENS))
    logits = torch.randn(TOKENS, 1, VOCAB, requires_grad=True)
    for recorded in (False, True):
        number = link.request(tokens)
        recorder.on = recorded
        answer = link.receive(number)
        loss = vcrd.validity_calibrated_kl(logits, answer, tokens.T).loss
        loss.mean().backward()
        recorder.on = False
    assert logits.grad.isfinite().all()
    pipe.send(recorder.calls)
    pipe.recv()  # the teacher records no more, so it does not record the goodbye
    link.close()
    rendezvous.close()


def teacher(options: argparse.Namespace, port: int, pipe: Connection) -> None:
    recorder = Recorder("teacher")
    hidden = options.payload == "hidden"
    link = TeacherLink.connect(
        settings(options, port),
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        sequence_length=TOKENS,
        place=TeacherPlace(),
        group=None,
        tensor_group=None,
        head=Head(STATE_SIZE, "float32") if hidden else None,
        head_weight=torch.randn(VOCAB, STATE_SIZE) if hidden else None,
    )
    output = torch.randn(TOKENS, 1, STATE_SIZE if hidden else VOCAB)
    for recorded in (False, True):
        (request,) = link.next_batch(1)
        time.sleep(MODEL_SECONDS)
        recorder.on = recorded
        link.respond(request, output)
    pipe.recv()  # the student has its gradient
    recorder.on = False
    pipe.send(recorder.calls)
    while link.next_batch(1) is not None:
        pass
    link.close()


def record(options: argparse.Namespace) -> list[dict]:
    """The calls of both processes, in the order of their times."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # each process has its own torch, as two jobs have
    pipes, processes = [], []
    for side in (student, teacher):
        mine, theirs = context.Pipe()
        process = context.Process(target=side, args=(options, port, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        calls = _result(pipes[0], "student")
        pipes[1].send(None)
        calls |= _result(pipes[1], "teacher")
        pipes[0].send(None)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
            process.join()
    first = min(calls.values())
    return [
        dict(process=key[0], thread=key[1], file=key[2], function=key[3], seconds=seconds - first)
        for key, seconds in sorted(calls.items(), key=lambda item: item[1])
    ]


def _result(pipe: Connection, name: str) -> dict:
    if not pipe.poll(SECONDS):
        raise RuntimeError(f"the {name} process did not finish within {SECONDS} seconds")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the {name} process failed; its error is above") from None


def counts(calls: list[dict]) -> dict[str, int]:
    """The number of distinct functions, and of the files that hold them."""
    return {
        "functions": len({(call["file"], call["function"]) for call in calls}),
        "files": len({call["file"] for call in calls}),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Lists the functions that one answer of the teacher passes through."
    )
    payloads = ("float16", "float32", "logits_8bit", "topk", "hidden")
    parser.add_argument("--payload", choices=payloads, default="float16")
    parser.add_argument("--transport", choices=("tcp", "fake"), default="tcp")
    parser.add_argument("--json", type=Path, help="also write the calls and the counts to this file")
    options = parser.parse_args(arguments)
    calls = record(options)
    where = None
    for call in calls:
        if where != (call["process"], call["thread"]):
            where = (call["process"], call["thread"])
            print(f"{call['process']}, thread {call['thread']}")
        print(f"    {call['function']:<50} {call['file']}")
    found = counts(calls)
    print(f"{found['functions']} functions in {found['files']} files")
    if options.json:
        options.json.write_text(json.dumps({**found, "calls": calls}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
