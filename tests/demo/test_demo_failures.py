"""A failing demo prints one clear message, exits with a code above 0, and ends all its processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ports import free_port
from waiting import wait_until

ROOT = Path(__file__).parents[2]


def command(output: Path, cache: Path, *more: str) -> list[str]:
    fixed = [sys.executable, "-m", "examples.demo", "--fast", "--output", str(output), "--cache", str(cache)]
    return [*fixed, *more]


def processes_of(output: Path) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process that names this run's folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:
            continue  # it has ended
        if str(output) in line and int(path.parent.name) != os.getpid():
            yield int(path.parent.name), line


@pytest.fixture
def running(demo_cache, tmp_path):
    """A demo after its first training step: (process, its output folder)."""
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("processes are found through /proc")
    output = tmp_path / "results"
    arguments = command(output, demo_cache, "--steps", "1000", "--port", str(free_port()))
    demo = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    events = output / "logs" / "events.jsonl"
    try:
        wait_until(
            lambda: demo.poll() is not None or (events.exists() and '"step"' in events.read_text()),
            150,
            "the first step",
        )
        assert demo.poll() is None, demo.communicate()[0]
        yield demo, output
    finally:
        demo.kill()
        demo.communicate()
        for pid, _ in processes_of(output):
            os.kill(pid, signal.SIGKILL)


def last_line(demo: subprocess.Popen, seconds: float) -> str:
    said, _ = demo.communicate(timeout=seconds)
    return said.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_killed_teacher_ends_the_demo_with_one_message(running):
    demo, output = running
    teachers = [
        pid for pid, line in processes_of(output) if "demo.job teacher" in line and "torch.d" not in line
    ]
    assert len(teachers) == 2
    os.kill(teachers[-1], signal.SIGKILL)
    sentence = last_line(demo, 40)
    reason = sentence.split(" (see ")[0]
    assert sentence.startswith("demo: ") and "teacher" in reason and "gloo" not in reason, sentence
    assert demo.returncode == 1
    wait_until(lambda: not list(processes_of(output)), 5, "the end of all processes")


@pytest.mark.slow
def test_all_processes_end_with_a_killed_launcher(running):
    demo, output = running
    demo.kill()
    demo.wait()
    wait_until(lambda: not list(processes_of(output)), 40, "the end of all processes")


@pytest.mark.slow
def test_a_signal_is_passed_on(running):
    demo, output = running
    demo.terminate()
    assert last_line(demo, 40) == "demo: stopped by SIGTERM; both jobs were ended"
    assert demo.returncode == 128 + signal.SIGTERM
    wait_until(lambda: not list(processes_of(output)), 5, "the end of all processes")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "demo: --steps: expected at least 1, got 0"),
        (["--port", "99999"], "demo: --port: expected 1 to 65535, got 99999"),
        (
            ["--output", "/proc/nowhere"],
            "demo: --output /proc/nowhere cannot be written: No such file or directory",
        ),
    ],
)
def test_a_wrong_argument_is_one_message(demo_cache, tmp_path, arguments, sentence):
    arguments = command(tmp_path, demo_cache, *arguments)
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.strip() == sentence


def test_without_a_gpu_its_option_is_one_message(demo_cache, tmp_path):
    arguments, none = command(tmp_path, demo_cache, "--gpu"), {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, cwd=ROOT, env=none, capture_output=True, text=True, timeout=60)
    found = re.fullmatch(r"demo: --gpu: expected a (GPU|torch with CUDA), got (.*)", done.stdout.strip())
    assert done.returncode == 1 and found, done.stdout
    assert (found[1] == "GPU") == (torch.version.cuda is not None)


def test_a_port_in_use_is_one_message_before_any_job_starts(demo_cache, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        arguments = command(tmp_path, demo_cache, "--port", str(port))
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = f"demo: port {port} cannot be used (Address already in use): choose another with --port"
    assert done.returncode == 1 and done.stdout.strip() == expected
    assert not list(processes_of(tmp_path))
