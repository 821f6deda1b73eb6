"""Many processes, one table: real processes that believe they are tasks of srun on several nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from doctor_runs import ROOT, SECONDS, Step, environment, forked, make_job, slurm
from fork_server import context
from ports import free_port
from waiting import wait_until

from vcrd.doctor import environment as environment_checks
from vcrd.doctor import examination
from vcrd.doctor.checks import run_check, run_checks
from vcrd.doctor.findings import Finding, info, merged, ok, problem
from vcrd.doctor.processes import Gathering, World, expand, world_of
from vcrd.plan.scenario import GPUS, MODELS, Scenario

NODES = ("b1", "b2", "b3")


def older_package(folder: Path, name: str, number: str) -> Path:
    metadata = folder / f"{name}-{number}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return folder


def test_differences_between_nodes_are_red_lines_that_name_them(tmp_path):
    """b3 has another megatron-core, another setting and a folder of its own under the shared one's name."""
    for node in ("common", "own"):
        (tmp_path / node).mkdir()
    each = {rank: {"cwd": tmp_path / "common"} for rank in (0, 1)}
    each[2] = {
        "cwd": tmp_path / "own",
        "path": [older_package(tmp_path / "packages", "megatron_core", "0.17.0")],
        "variables": {"VCRD_SHARPNESS": "2"},
    }
    outcomes = Step(NODES, "--run-dir", "run", each=each).ended()
    assert [outcomes[rank].status for rank in range(3)] == [1, 0, 0], outcomes
    assert not outcomes[1].out and not outcomes[2].out and not outcomes[0].err
    got = outcomes[0]
    assert got.line("processes")["found"] == "all 3 came, from 3 nodes"
    found = {finding["name"]: finding for finding in got.problems if finding["name"] != "shared folder"}
    assert set(found) == {"megatron-core", "settings"}
    assert re.match(r"b3: 0\.17\.0, .*; others: 0\.", found["megatron-core"]["found"])
    assert "b3: " in found["settings"]["found"] and "VCRD_SHARPNESS=2" in found["settings"]["found"]
    shared = {
        finding["where"]: finding["found"] for finding in got.problems if finding["name"] == "shared folder"
    }
    assert set(shared) == {"b1, b2", "b3"} or set(shared) == {"b1", "b2", "b3"}
    assert any("run here and on b3 (rank 2) are different" in text for text in shared.values())
    assert any("run here and on b1 (rank 0), b2 (rank 1) are different" in text for text in shared.values())
    # What was written for the test is gone, except the folder.
    assert [list((tmp_path / node / "run").iterdir()) for node in ("common", "own")] == [[], []]


def look_at_little() -> None:
    """Checks take seconds of a busy machine, and the shorter time-outs are, the shorter is the test."""
    examination._FIRST = examination._THEN = ()


def join_and_be_killed(variables: dict[str, str]) -> None:
    Gathering(world_of(variables), 60).gather({"node": "b3", "token": ""})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_never_comes_and_one_that_is_killed_are_named(tmp_path):
    nodes = (*NODES, "b4")
    options = ("--run-dir", str(tmp_path), "--student", "tp=2", "--teacher", "tp=2", "--seconds", "0.5")
    each = {rank: {"before": look_at_little} for rank in (0, 1)}
    with Step(nodes, *options, "--timeout", "6", each=each, absent=[2, 3]) as step:
        lost = context().Process(target=join_and_be_killed, args=(slurm(2, nodes, step.port),))
        lost.start()
        got = step.ended()[0]
        lost.join(SECONDS)
    assert lost.exitcode == -signal.SIGKILL and got.status == 1, got
    found = [finding["found"] for finding in got.problems if finding["name"] == "processes"]
    assert found == [
        "rank 3 did not come, no rank of b4 came",
        "rank 2 on b3 came, then ended or took too long",
    ]
    assert got.line("shared folder")["status"] == "ok"  # the two that are left are looked at
    # The teacher's ranks are not there, of which there are lines: no cable is blamed for it.
    line = got.line("link")
    assert line["status"] == "not checked" and line["found"].startswith(
        "0 of 2 pairs were measured, without ranks 2, 3"
    )


def hang_at_the_shared_folder() -> None:
    environment_checks.SharedFolder.missing = lambda *_: time.sleep(600)


def test_where_rank_0_is_lost_nothing_stays_in_the_shared_folder(tmp_path):
    options = ("--run-dir", str(tmp_path), "--timeout", "20")
    with Step(("b1", "b2"), *options, each={0: {"before": hang_at_the_shared_folder}}) as step:
        wait_until(lambda: len(list(tmp_path.glob(".vcrd-doctor-*-*"))) == 2, 120, "both have written")
        step.processes[0].kill()
        got = step.ended()[1]
    assert got.status == 1 and "rank 0 does not answer b2" in got.err
    assert not list(tmp_path.glob(".vcrd-doctor-*-1"))


def test_without_rank_0_a_process_says_so_and_ends():
    variables = environment(**slurm(1, ("b1", "b2"), free_port()))
    got = forked("--timeout", "2", variables=variables)
    assert got.status == 1 and not got.out
    assert re.match(
        r"python -m vcrd doctor: b2 cannot reach rank 0 at 127\.0\.0\.1:\d+ within 2 seconds", got.err
    )
    assert got.err.count("\n") == 1


def test_where_rank_0_cannot_listen_it_says_so_and_looks_at_its_own_node():
    import socket
    from contextlib import closing

    with closing(socket.socket()) as taken:
        taken.bind(("", 0))
        taken.listen()
        variables = environment(**slurm(0, ("b1", "b2"), taken.getsockname()[1]), GLOO_SOCKET_IFNAME="lo")
        got = forked("--timeout", "60", "--json", variables=variables)
    line = got.line("processes")
    assert got.status == 1 and "the other 1 were not checked: rank 0 cannot listen at" in line["found"]
    assert got.line("kernels")["status"] == "ok"


@pytest.mark.slow
def test_under_torchrun_there_is_one_table():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vcrd", "doctor", "--student", "tp=1", "--teacher", "tp=1", "--seconds", "0.3"]
    variables = environment(VCRD_ADDRESS=f"127.0.0.1:{free_port()}")
    outcome = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    assert outcome.returncode == 0, outcome
    assert outcome.stdout.count("vcrd doctor: 2 processes on ") == 1
    assert re.search(
        r"ok +link +\d\S* GB/s from rank 1 \(\S+\) to rank 0 \(\S+\); give both models", outcome.stdout
    )


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [
        ({}, 0, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "ENVIRONMENT": "BATCH"}, 0, 1),  # the batch script itself
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"}, 3, 4),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2),
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "b1",
                "MASTER_PORT": "29500",
                "SLURM_PROCID": "0",
            },
            1,
            2,
        ),
    ],
)
def test_where_a_process_stands(variables, rank, size):
    world = world_of(variables)
    assert (world.rank, world.size) == (rank, size)


def test_without_a_master_the_first_node_and_a_port_of_the_job_are_taken():
    variables = {
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "5001",
    }
    world = world_of(variables | {"SLURM_NNODES": "2", "SLURM_LOCALID": "1"})
    assert (world.host, world.port, world.local_rank, world.local_size) == ("gpu07", 10007, 1, 2)
    assert world.expected == ("gpu07", "gpu08")


def test_a_step_over_both_components_of_a_heterogeneous_job_is_one_world():
    """What srun --het-group=0,1 of Slurm 22.05 set, two tasks on each node."""
    step = {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6"}
    step |= {
        "SLURM_STEP_NODELIST": "b[1-3]",
        "SLURM_NNODES": "3",
        "SLURM_JOB_ID": "3",
        "SLURM_HET_JOB_ID": "2",
    }
    world = world_of(
        {**step, "SLURM_HET_SIZE": "2", "ENVIRONMENT": "BATCH", "SLURM_JOB_NODELIST_HET_GROUP_1": "b3"}
    )
    assert (world.rank, world.size, world.local_rank, world.local_size) == (4, 6, 0, 2)
    assert (world.host, world.port, world.expected) == ("b1", 10011, ("b1", "b2", "b3"))


def test_short_forms_of_node_lists():
    assert expand("b[1-3,07-09],c2") == ("b1", "b2", "b3", "b07", "b08", "b09", "c2")
    assert expand("r[1-2]n[3-4]") == ("r1n3", "r1n4", "r2n3", "r2n4")
    assert expand("") == ()


def of_nodes(*findings: Finding) -> list[Finding]:
    """One finding from each of the nodes b0, b1, ..., two ranks on each, of which the second says the same."""
    found = {2 * i + j: [finding] for i, finding in enumerate(findings) for j in range(2)}
    return merged(found, {rank: f"b{rank // 2}" for rank in found})


def test_what_all_say_is_said_once():
    assert of_nodes(ok("torch", "2.11"), ok("torch", "2.11")) == [ok("torch", "2.11")]


def test_a_fault_of_one_node_names_it_and_the_others_are_green():
    wrong = problem("gpu memory", "taken", "End it.")
    lines = of_nodes(ok("gpu memory", "free"), wrong, ok("gpu memory", "free"))
    assert [(line.status, line.where) for line in lines] == [("problem", "b1"), ("ok", "b0, b2")]


def test_versions_must_be_equal_and_other_values_need_not():
    (line,) = of_nodes(
        *(ok("driver", number, fix_if_different="Install one.") for number in ("580", "550", "580"))
    )
    assert (line.status, line.found, line.fix) == ("problem", "b1: 550; others: 580", "Install one.")
    (line,) = of_nodes(info("space", "5 GB"), info("space", "6 GB"))
    assert line.status == "info" and line.found == "5 GB (on b0; other values elsewhere)"


def test_a_rank_among_others_of_its_node_is_named_as_such():
    found = {rank: [info("x", "y")] for rank in range(4)}
    found[3] = [problem("x", "z", "Fix it.")]
    lines = merged(found, {rank: f"b{rank // 2}" for rank in found})
    assert lines[0].where == "rank 3 on b1" and lines[1].where == "b0, rank 2 on b1"


def test_many_nodes_are_counted():
    findings = [problem("x", "z", "Fix it.")] * 9 + [ok("x", "y")]
    assert of_nodes(*findings)[0].where == "b0, b1, b2, b3 and 5 others"


@pytest.mark.parametrize(
    ("seconds", "says"), [(0.5, None), (42.0, "42 seconds ahead of"), (-42.0, "42 seconds behind")]
)
def test_a_clock_that_is_wrong(seconds, says):
    line = examination._clock(make_job(World(rank=1, size=2)), {0: 1000.0, 1: 1000.0 + seconds})
    assert line.status == ("ok" if says is None else "problem") and (says or "within") in line.found


def test_a_check_that_hangs_or_fails_is_a_line_of_its_own():
    held = threading.Event()

    def hangs(job):
        held.wait(60)

    def fails(job):
        raise LookupError("what no one foresaw")

    try:
        (line,) = run_check(hangs, make_job(), 0.2)
        assert line.status == "problem" and "no answer within 0.2 seconds" in line.found
    finally:
        held.set()
    (line,) = run_check(fails, make_job(), 10)
    assert line.status == "problem" and "LookupError('what no one foresaw')" in line.found


def test_what_hangs_takes_no_other_line_with_it_and_is_named(tmp_path):
    os.mkfifo(tmp_path / "secret")  # as a file of a server that does not answer
    variables = {
        "VCRD_SECRET_FILE": str(tmp_path / "secret"),
        "VCRD_SHARPNES": "1",
        "NCCL_P2P_DISABLE": "1",
    }
    sides = {"teacher": MODELS["Qwen3-32B"], "student": MODELS["Qwen3-4B"]}
    run = Scenario(**sides, teacher_gpu=GPUS["h100"], student_gpu=GPUS["h100"], replicas=1)
    job = make_job(variables=variables, scenario=run, timeout=2.0)
    try:
        lines = run_checks(job, *environment_checks.CHECKS)
        found = {line.name: line.found for line in lines if line.fix}
        assert {"check", "settings", "debug variables"} <= set(found)
        assert found["check"] == "secret: no answer within 2 seconds"
        (line,) = examination._link(job, None, {0: "b1"})
        assert line.found == "not measured, because the secret could not be read"
    finally:
        os.close(os.open(tmp_path / "secret", os.O_WRONLY))  # ends who still reads
