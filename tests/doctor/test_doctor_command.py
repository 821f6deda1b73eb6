"""The command as a user sees it: five problems planted at once, the table, JSON, exit status, wrong options."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing

import pytest
import wrong_apex
from doctor_runs import ROOT, ended, environment, forked, run, start
from ports import free_port
from waiting import wait_until

from vcrd.__main__ import main


def test_a_machine_with_five_problems_has_five_red_lines_and_no_more(tmp_path):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "file").touch()
        packages = [wrong_apex.install(tmp_path / "packages")]
        variables = environment(
            VCRD_ADDRESS=f"127.0.0.1:{port}",
            VCRD_SHARPNES="2",
            NCCL_SOCKET_IFNAME="ib7",
        )
        options = ("--run-dir", str(tmp_path / "file" / "run"))
        got = forked("--json", *options, variables=variables, path=packages)
        text = forked(*options, variables=variables, path=packages)
    assert got.status == text.status == 1
    found = {finding["name"]: finding for finding in got.problems}
    assert (
        set(found) == {"apex", "address", "settings", "interfaces", "run directory"}
        and len(got.problems) == 5
    )
    assert "another project" in found["apex"]["found"]
    assert f"127.0.0.1:{port} cannot be listened at" in found["address"]["found"]
    assert "VCRD_SHARPNES is" in found["settings"]["found"] and "VCRD_SHARPNESS" in found["settings"]["fix"]
    assert "NCCL_SOCKET_IFNAME=ib7" in found["interfaces"]["found"]
    assert "Not a directory" in found["run directory"]["found"]
    assert json.loads(got.out)["problems"] == 5
    # The table says the same, each fix under its line.
    assert text.out.splitlines()[-1].startswith("5 problems, ")
    for finding in got.problems:
        assert re.search(rf"problem +{finding['name']} +{re.escape(finding['found'])}\n +fix: ", text.out), (
            text.out
        )
        assert f"fix: {finding['fix']}\n" in text.out


def broken_copy(folder):
    """vcrd as it is installed, but its extension is cut off in the middle."""
    shutil.copytree(ROOT / "vcrd", folder / "vcrd", ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    (built,) = (ROOT / "vcrd").glob(f"_C.*{sys.version_info[0]}{sys.version_info[1]}*.so")
    (folder / "vcrd" / built.name).write_bytes(built.read_bytes()[:100_000])
    return folder


@pytest.mark.slow
def test_five_other_problems(tmp_path):
    with closing(socket.socket()) as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        secret = tmp_path / "secret"
        secret.write_text("sesame")
        secret.chmod(0o644)
        port = taken.getsockname()[1]
        variables = environment(
            [broken_copy(tmp_path)],
            VCRD_ADDRESS=f"127.0.0.1:{free_port()}",
            VCRD_SECRET_FILE=str(secret),
            NCCL_P2P_DISABLE="1",
        )
        low = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
        options = ["--json", "--run-dir", str(tmp_path / "run"), "--port", str(port)]
        got = ended(start(options, variables, preexec_fn=low, cwd=tmp_path))
    assert got.status == 1, got.err
    found = {finding["name"]: finding for finding in got.problems}
    assert (
        set(found) == {"extension", "secret", "debug variables", "open files", "ports"}
        and len(got.problems) == 5
    )
    assert (
        "crashes with SIGBUS" in found["extension"]["found"]
        or "cannot be loaded" in found["extension"]["found"]
    )
    # What could not be looked at for that reason is not red as well.
    assert got.line("kernels")["status"] == "not checked"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "raise ImportError('libcudnn.so.9: cannot open shared object file')",
            "cannot be imported: libcudnn.so.9",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "importing it crashes with SIGSEGV",
        ),
    ],
)
def test_a_torch_that_does_not_load_is_one_red_line(tmp_path, text, says):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(text)
    got = run("--json", variables=environment([tmp_path]))
    (line,) = got.findings
    assert got.status == 1 and not got.err
    assert line["name"] == "torch" and line["status"] == "problem" and line["found"].startswith(says)


def test_an_interrupted_command_says_no_more(tmp_path):
    """It is interrupted while it waits for a file that does not answer."""
    secret = tmp_path / "secret"
    os.mkfifo(secret)
    writers: list[int] = []  # open till the end: closed, they would answer

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # as long as nobody has it open for reading
            writers.append(os.open(secret, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    # What a shell runs in the background ignores the signal, and so would all that these tests start there.
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = start([], environment(VCRD_SECRET_FILE=str(secret)), preexec_fn=heeds)
    try:
        wait_until(is_read, 120, "the secret is being read", process.poll)
        process.send_signal(signal.SIGINT)
        got = ended(process)
    finally:
        process.kill()
        for writer in writers:
            os.close(writer)
    assert (got.status, got.out, got.err) == (130, "", "")


def test_a_good_machine_exits_with_0_and_says_what_it_could_not_check(tmp_path):
    variables = environment(VCRD_ADDRESS=f"127.0.0.1:{free_port()}")
    got = run("--run-dir", str(tmp_path), variables=variables)
    assert got.status == 0 and not got.err, got
    lines = got.out.splitlines()
    assert lines[0].startswith("vcrd doctor: 1 process on ")
    assert re.fullmatch(r"0 problems, \d+ ok, \d+ not checked", lines[-1])
    assert os.listdir(tmp_path) == []
    assert "\x1b" not in got.out
    for line in lines[1:-1]:  # aligned, none broken
        assert re.match(r"(ok|info|not checked) +", line), line
    starts = {re.match(r"(?:ok|info|not checked) +\S+(?: \S+)* {2,}", line).end() for line in lines[1:-1]}
    assert len(starts) == 1


@pytest.mark.parametrize("columns", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_on_a_terminal_lines_are_broken_and_no_word_is_lost(tmp_path, columns):
    import fcntl
    import struct
    import termios

    (tmp_path / "file").touch()
    variables = environment(VCRD_ADDRESS=f"127.0.0.1:{free_port()}", TERM="xterm")
    variables = {
        name: text for name, text in variables.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    folder = str(tmp_path / "file" / "run")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "vcrd", "doctor", "--run-dir", folder]
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=follower, stderr=follower)
    os.close(follower)
    text = b""
    try:
        while piece := os.read(leader, 65536):
            text += piece
    except OSError:  # what the end of a terminal is to its reader
        pass
    finally:
        os.close(leader)
        process.kill() if process.poll() is None and not text else process.wait()
    shown = text.decode()
    assert process.returncode == 1
    assert "\x1b[1;31mproblem" in shown and "\x1b[32mok" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= columns
    words = " ".join(plain.split())
    for expected in ("cannot be written: Not a directory", "a file has this name."):
        assert expected in words.replace(folder, "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "0"], "--port: expected an integer of at least 1, got '0'"),
        (["--port", "70000"], "--port: expected a port from 1 to 65535, got '70000'"),
        (["--gpus", "-1"], "--gpus: expected an integer of at least 0, got '-1'"),
        (["--timeout", "soon"], "--timeout: expected a positive number, got 'soon'"),
        (["--seconds", "0"], "--seconds: expected a number from 0.1 to 60, got '0'"),
        (["--student", "tp=2"], "--teacher: expected a layout because --student is given, got none"),
        (
            ["--student", "tp=0", "--teacher", "tp=1"],
            "--student tp: expected an integer of at least 1, got '0'",
        ),
        (
            ["--student", "tp=2,dp=2", "--teacher", "replicas=3"],
            "--teacher replicas: expected at most .* student, 2, got 3",
        ),
        (
            ["--student", "tp=2", "--teacher", "Qwen3-32B"],
            "--student: expected a model because --teacher names one, got 'tp=2'",
        ),
        (
            ["--student", "Qwen3-4B", "--teacher", "Qwen3-33B"],
            "--teacher: expected a known model .*; did you mean",
        ),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(capsys, options, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *options])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out and said.err.count("\n") == 1
    assert re.match(rf"python -m vcrd doctor: {sentence}|python -m vcrd: {sentence}", said.err), said.err


def test_wrong_options_and_help_do_not_wait_for_torch():
    code = (
        "import sys\nfrom vcrd.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'rich', 'pynvml'} & set(sys.modules)))\n"
    )
    for options in (["doctor", "--help"], ["doctor", "--port", "x"]):
        outcome = subprocess.run(
            [sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=ROOT
        )
        assert outcome.stdout.splitlines()[-1] in ("0 []", "2 []"), outcome


def test_a_launcher_s_variable_that_is_none_is_named():
    got = run(variables=environment(RANK="0", WORLD_SIZE="2"))
    assert got.status == 2 and "MASTER_ADDR: expected a value because RANK and WORLD_SIZE are set" in got.err


def test_a_single_process_measures_the_link_over_loopback():
    variables = environment(VCRD_ADDRESS=f"127.0.0.1:{free_port()}")
    got = forked(
        "--json", "--student", "tp=2,dp=2", "--teacher", "tp=1", "--seconds", "0.3", variables=variables
    )
    assert got.status == 0, got
    assert re.match(
        r"\d\S* GB/s over the loopback of this node; a single process cannot measure the network",
        got.line("link")["found"],
    )
