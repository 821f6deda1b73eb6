"""Settings, variables, limits, names, ports and folders: each problem planted by itself, in this process."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from contextlib import closing, contextmanager

import pytest
import torch
from doctor_runs import make_job
from ports import free_port

from vcrd.doctor import environment, network
from vcrd.doctor.checks import Job
from vcrd.doctor.findings import INFO, OK, PROBLEM, UNCHECKED
from vcrd.doctor.processes import World
from vcrd.plan.scenario import GPUS, MODELS, Scenario

HERE = World(node="b1")


def job(variables: dict[str, str] | None = None, world: World = HERE, **more) -> Job:
    return make_job(world, variables, **more)


def checked(module, job: Job) -> list:
    return [finding for check in module.CHECKS for finding in check(job)]


def line(findings, name: str):
    (found,) = [finding for finding in findings if finding.name == name]
    return found


TWO_NODES = World(size=2, local_size=1, node="b1", expected=("b1", "b2"))


@pytest.mark.parametrize(
    ("variables", "found", "fix"),
    [
        ({"VCRD_SHARPNES": "2"}, "VCRD_SHARPNES is not a setting of vcrd", "Write VCRD_SHARPNESS"),
        ({"VCRD_XYZZY": "2"}, "VCRD_XYZZY is not a setting of vcrd", "Unset it."),
        (
            {"VCRD_SHARPNESS": "much"},
            "VCRD_SHARPNESS (--vcrd-sharpness): expected a number, got 'much'",
            "Correct the variable",
        ),
        (
            {"VCRD_PAYLOAD": "float8"},
            "VCRD_PAYLOAD (--vcrd-payload): expected one of float16",
            "Correct the variable",
        ),
        (
            {"VCRD_VOCAB_SIZE": "0"},
            "VCRD_VOCAB_SIZE (--vcrd-vocab-size): expected an integer of at least 1",
            "Correct the variable",
        ),
    ],
)
def test_a_setting_that_is_none_or_wrong(variables, found, fix):
    got = line(checked(environment, job(variables)), "settings")
    assert got.status == PROBLEM and got.found.startswith(found) and got.fix.startswith(fix)


def test_every_setting_that_is_wrong_has_a_line():
    variables = {"VCRD_SHARPNES": "3", "VCRD_FLOOR": "abc", "VCRD_PAYLOAD": "flot16", "VCRD_CEILING": "2"}
    texts = [f.found for f in checked(environment, job(variables)) if f.name == "settings" and f.fix]
    assert [text.split()[0].strip(":") for text in texts] == ["VCRD_FLOOR", "VCRD_PAYLOAD", "VCRD_SHARPNES"]


def test_settings_that_are_right_count_beside_wrong_ones():
    variables = {"VCRD_ADDRESS": "127.0.0.1:29999", "VCRD_SHARPNES": "2", "VCRD_TOP_K": "none"}
    assert environment.link_settings(variables).address == "127.0.0.1:29999"


def test_the_secret_is_never_shown():
    got = line(checked(environment, job({"VCRD_SECRET": "sesame", "VCRD_SHARPNESS": "2"})), "settings")
    assert got.found == "VCRD_SHARPNESS=2"


def test_a_secret_that_others_may_read(tmp_path):
    path = tmp_path / "secret"
    path.write_text("sesame")
    path.chmod(0o644)
    variables = {"VCRD_SECRET_FILE": str(path)}
    got = line(checked(environment, job(variables)), "secret")
    assert got.status == PROBLEM and got.fix == f"Run `chmod 600 {path}`."
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert line(checked(environment, job(variables)), "secret").status == OK
    path.write_text("")
    assert "that holds a secret" in line(checked(environment, job(variables)), "secret").found


@pytest.mark.parametrize("name", ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "CUDA_LAUNCH_BLOCKING"])
def test_a_debug_variable_that_was_left_set(name):
    got = line(checked(environment, job({name: "1"})), "debug variables")
    assert got.status == PROBLEM and got.found.startswith(f"{name}=1") and got.fix == f"Unset {name}."
    assert not [
        finding for finding in checked(environment, job({name: "0"})) if finding.name == "debug variables"
    ]


@pytest.fixture
def infiniband(tmp_path, monkeypatch):
    for name in ("mlx5_0", "mlx5_1"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(environment, "_INFINIBAND", tmp_path)


def test_infiniband_that_is_switched_off(infiniband, monkeypatch):
    got = line(checked(environment, job({"NCCL_IB_DISABLE": "1"})), "debug variables")
    assert got.status == PROBLEM and "mlx5_0, mlx5_1" in got.found
    monkeypatch.setattr(environment, "_INFINIBAND", environment.Path("/nowhere"))
    assert not [f for f in checked(environment, job({"NCCL_IB_DISABLE": "1"})) if f.name == "debug variables"]


@pytest.mark.parametrize(
    ("text", "status"),
    [("mlx5", OK), ("=mlx5_1:1", OK), ("mlx5_7", PROBLEM), ("=mlx5", PROBLEM), ("^mlx5_0", OK)],
)
def test_adapters_that_nccl_is_told_to_use(infiniband, text, status):
    assert line(checked(network, job({"NCCL_IB_HCA": text})), "adapters").status == status


@pytest.mark.parametrize(
    ("name", "text", "status"),
    [
        ("NCCL_SOCKET_IFNAME", "lo", OK),
        ("NCCL_SOCKET_IFNAME", "l", OK),  # the beginning of a name
        ("NCCL_SOCKET_IFNAME", "=l", PROBLEM),
        ("NCCL_SOCKET_IFNAME", "ib7", PROBLEM),
        ("NCCL_SOCKET_IFNAME", "ib7,lo", OK),
        ("NCCL_SOCKET_IFNAME", "^ib7", OK),
        ("GLOO_SOCKET_IFNAME", "l", PROBLEM),
        ("GLOO_SOCKET_IFNAME", "lo", OK),
    ],
)
def test_interfaces_that_nccl_and_gloo_are_told_to_use(name, text, status):
    got = line(checked(network, job({name: text})), "interfaces")
    assert got.status == status and f"{name}={text}" in got.found


def test_locked_memory_is_of_interest_with_infiniband_only(infiniband, monkeypatch):
    monkeypatch.setattr(environment.resource, "getrlimit", lambda what: (65536, 65536))
    findings = checked(environment, job())
    assert "0.0655 MB" in line(findings, "locked memory").found
    monkeypatch.setattr(environment, "_INFINIBAND", environment.Path("/nowhere"))
    assert not [finding for finding in checked(environment, job()) if finding.name == "locked memory"]


def test_too_few_open_files(monkeypatch):
    limits = {resource.RLIMIT_NOFILE: (1024, 4096), resource.RLIMIT_MEMLOCK: (-1, -1)}
    monkeypatch.setattr(environment.resource, "getrlimit", limits.get)
    assert line(checked(environment, job()), "open files").status == OK
    got = line(checked(environment, job(world=World(size=512, node="b1"))), "open files")
    assert got.status == PROBLEM and got.found == "1024 per process, but a run of 512 processes needs 4096"


def test_the_fix_of_open_files_respects_the_hard_limit(monkeypatch):
    for hard, fix in (
        (1 << 20, "ulimit -n 65536"),
        (4096, "ulimit -n 4096"),
        (512, "LimitNOFILE of slurmd"),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (256, hard))
        assert fix in line(environment.open_files(job()), "open files").fix


def test_shared_memory_of_a_container(monkeypatch):
    space = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 1, 1, 1, 0, 255))  # 64 MiB
    monkeypatch.setattr(environment.os, "statvfs", lambda path: space)
    got = line(checked(environment, job()), "shared memory")
    assert got.status == PROBLEM and "0.0671 of 0.0671 GB" in got.found and "--shm-size" in got.fix


@pytest.mark.parametrize(
    ("value", "gpu", "status"),
    [("1", True, OK), ("8", True, PROBLEM), (None, True, PROBLEM), (None, False, INFO)],
)
def test_connections_of_tensor_parallelism(monkeypatch, value, gpu, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    models = {"teacher": MODELS["Qwen3-32B"], "student": MODELS["Qwen3-4B"]}
    run = Scenario(**models, teacher_gpu=GPUS["h100"], student_gpu=GPUS["h100"], student_tensor=2)
    variables = {} if value is None else {"CUDA_DEVICE_MAX_CONNECTIONS": value}
    findings = checked(environment, job(variables, scenario=run))
    assert line(findings, "connections").status == status


@contextmanager
def listening(port: int):
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        yield


def test_a_port_in_use():
    port = free_port()
    variables = {"VCRD_ADDRESS": f"127.0.0.1:{port}"}
    assert line(checked(network, job(variables, ports=(port,))), "address").status == OK
    with listening(port):
        findings = checked(network, job(variables, ports=(port,)))
        for name in ("address", "ports"):
            got = line(findings, name)
            assert got.status == PROBLEM and str(port) in got.found and f"sport = :{port}" in got.fix
        assert line(checked(network, job(variables, during_run=True)), "address").status == UNCHECKED
        alone = checked(network, job({"MASTER_PORT": str(port)}))
        assert line(alone, "ports").found == f"port {port} is in use"
    assert line(checked(network, job(variables, ports=(port,))), "ports").found == f"{port} free"


def test_an_address_that_no_other_node_finds():
    got = line(checked(network, job({"VCRD_ADDRESS": "localhost:29600"}, TWO_NODES)), "address")
    assert got.status == PROBLEM and "which other nodes cannot reach" in got.found
    one_node = World(size=2, local_size=2, node="b1")
    assert (
        line(checked(network, job({"VCRD_ADDRESS": f"localhost:{free_port()}"}, one_node)), "address").status
        == OK
    )


def test_an_address_that_nobody_gave_is_no_problem_of_several_nodes():
    assert line(checked(network, job({}, TWO_NODES)), "address").status == UNCHECKED


def test_an_address_of_another_machine_or_of_none():
    got = line(checked(network, job({"VCRD_ADDRESS": "198.51.100.7:29600"})), "address")
    assert got.status == UNCHECKED and "another machine" in got.found
    got = line(checked(network, job({"VCRD_ADDRESS": "no-such-host.invalid:29600"})), "address")
    assert got.status == PROBLEM and "cannot be resolved" in got.found


def test_an_interface_that_is_not_there():
    got = line(checked(network, job({"VCRD_INTERFACE": "ib7"})), "link interface")
    assert got.status == PROBLEM and "VCRD_INTERFACE=ib7" in got.found and "one of lo, " in got.found
    got = line(checked(network, job({"VCRD_INTERFACE": "lo"})), "link interface")
    assert got.status == OK and "127.0.0.1" in got.found


def test_a_host_name_that_only_this_node_finds(monkeypatch):
    monkeypatch.setattr(network.socket, "gethostname", lambda: "localhost")
    got = line(checked(network, job(world=TWO_NODES)), "host name")
    assert got.status == PROBLEM and "GLOO_SOCKET_IFNAME" in got.fix
    assert line(checked(network, job({"GLOO_SOCKET_IFNAME": "lo"}, TWO_NODES)), "host name").status == OK
    assert line(checked(network, job()), "host name").status == OK


def test_a_folder_that_can_be_written(tmp_path):
    findings = environment.run_directory(job(run_dir=str(tmp_path / "run")))
    assert [finding.status for finding in findings] == [OK, OK]
    assert os.listdir(tmp_path / "run") == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (got,) = environment.run_directory(job(run_dir=str(tmp_path / "file" / "run")))
    assert got.status == PROBLEM and got.found.endswith("cannot be written: Not a directory")
    (got,) = environment.run_directory(job({"VCRD_ADDRESS": "file:/proc/vcrd/address"}))
    assert got.status == PROBLEM and got.found.startswith("/proc/vcrd cannot be written")


def test_no_folder_is_not_checked():
    (got,) = environment.run_directory(job())
    assert got.status == UNCHECKED and "--run-dir" in got.found


def test_too_little_space(tmp_path, monkeypatch):
    space = os.statvfs_result((4096, 4096, 10**6, 10**5, 10**5, 1, 1, 1, 0, 255))  # 0.41 GB
    monkeypatch.setattr(environment.os, "statvfs", lambda path: space)
    got = line(environment.run_directory(job(run_dir=str(tmp_path))), "space")
    assert got.status == PROBLEM and "0.41 GB free" in got.found


def test_the_folder_of_telemetry(tmp_path):
    (tmp_path / "file").touch()
    assert environment.telemetry(job()) == []
    (got,) = environment.telemetry(job({"VCRD_TELEMETRY_DIR": str(tmp_path / "records")}))
    assert got.status == OK and not list((tmp_path / "records").iterdir())
    (got,) = environment.telemetry(job({"VCRD_TELEMETRY_DIR": str(tmp_path / "file")}))
    assert got.status == PROBLEM and "a file has this name" in got.fix
    (got,) = environment.telemetry(job({"VCRD_TELEMETRY_DIR": "/proc/records"}))
    assert got.status == PROBLEM and "can write on every node" in got.fix


def test_a_full_folder_is_not_taken_for_one_without_permission(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(environment, "_write", full)
    (got,) = environment.run_directory(job(run_dir=str(tmp_path)))
    assert "No space left" in got.found and got.fix.startswith("Remove old checkpoints")
