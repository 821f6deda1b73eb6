"""Problems of driver and GPUs, each planted in a node of a fake NVML, and the node without a problem."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from doctor_runs import make_job
from fake_nvml import FakeGpu, FakeNvml

from vcrd.doctor import gpus as gpu_checks
from vcrd.doctor import packages
from vcrd.doctor.findings import INFO, OK, PROBLEM, UNCHECKED
from vcrd.doctor.processes import World


@pytest.fixture(autouse=True)
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def found(monkeypatch, nvml: FakeNvml, gpus: int = 0, size: int = 1, environment=None):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    findings = gpu_checks.driver_and_gpus(make_job(World(node="b1", size=size), environment, gpus=gpus))
    assert nvml.open == 0  # what was opened is closed
    for finding in findings:
        assert bool(finding.fix) == (finding.status == PROBLEM), finding
    return findings


def only_problem(findings, name: str) -> str:
    problems = [finding for finding in findings if finding.status == PROBLEM]
    assert [finding.name for finding in problems] == [name], problems
    return f"{problems[0].found} | {problems[0].fix}"


def node(**changes) -> FakeNvml:
    """Eight GPUs, the third of them with these changes."""
    gpus = [FakeGpu() for _ in range(8)]
    gpus[2] = replace(gpus[2], **changes)
    return FakeNvml(*gpus)


def test_a_good_node_has_one_green_line_for_each_check(monkeypatch):
    findings = found(monkeypatch, node())
    assert {finding.status for finding in findings} == {OK}
    assert [finding.name for finding in findings] == [
        "driver",
        "gpus",
        "gpu memory",
        "gpu errors",
        "gpu clocks",
        "gpu power",
        "nvlink",
    ]
    texts = {finding.name: finding.found for finding in findings}
    assert texts["driver"] == "580.65.06, for CUDA up to 13.0; torch is built with CUDA 13.0"
    assert texts["gpus"] == "8 x NVIDIA H100 80GB HBM3"
    assert texts["nvlink"] == "18 links of each GPU are up"


def test_what_a_run_holds_is_no_problem_during_it(monkeypatch):
    gpus = node(used=79_000_000_000, processes={4711: "/usr/bin/python train.py"})
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    findings = gpu_checks.driver_and_gpus(make_job(World(node="b1", size=1), during_run=True))
    (line,) = [finding for finding in findings if finding.name == "gpu memory"]
    assert line.status == OK and "during a run" in line.found


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        (
            "gpu memory",
            {"used": 41_000_000_000, "processes": {4711: "/usr/bin/python train.py"}},
            "GPU 2: 41.0 of 85.5 GB in use by process 4711 (python)",
        ),
        ("gpu memory", {"used": 41_000_000_000}, "in use by processes that are not visible from here"),
        ("nvlink", {"links": [1] * 7 + [0] + [1] * 10}, "GPU 2: 17 of 18 links are up (down: 7)"),
        ("nvlink", {"links": []}, "GPU 2: 0 of 18 links are up"),
        (
            "gpu clocks",
            {"reasons": 0x40, "clock": 345},
            "GPU 2: throttled to 345 of 1980 MHz because it is too hot",
        ),
        ("gpu clocks", {"reasons": 0x80, "clock": 800}, "because the power supply requests it"),
        (
            "gpu clocks",
            {"application_clock": 1200},
            "GPU 2: the clock is set to 1200 MHz, below its default of 1980",
        ),
        ("gpu errors", {"ecc_errors": 3}, "GPU 2: 3 uncorrected memory errors (ECC)"),
        ("gpu errors", {"remapped": (0, 1, 1, 0)}, "GPU 2: damaged memory rows will be remapped"),
        ("gpu errors", {"remapped": (0, 1, 0, 1)}, "GPU 2: damaged memory rows could not be remapped"),
        ("gpu mode", {"mode": 2}, "GPU 2: the compute mode is PROHIBITED"),
        ("gpus", {"name": "NVIDIA H200"}, "7 x NVIDIA H100 80GB HBM3 and 1 x NVIDIA H200"),
        ("gpu count", {"lost": True}, "GPU 2 does not answer: GPU is lost"),
    ],
)
def test_a_problem_of_one_gpu_is_one_red_line_that_names_it(monkeypatch, name, changes, says):
    findings = found(monkeypatch, node(**changes))
    assert says in only_problem(findings, name)
    # The others of the node are green in the same table.
    assert sum(finding.status == OK for finding in findings) >= 6 - (name == "gpus")


def test_a_problem_that_several_gpus_have_is_one_line(monkeypatch):
    gpus = [FakeGpu() for _ in range(8)]
    for index in (1, 2, 5):
        gpus[index] = replace(gpus[index], application_clock=1200)
    text = only_problem(found(monkeypatch, FakeNvml(*gpus)), "gpu clocks")
    assert text.startswith("GPU 1, GPU 2, GPU 5: the clock is set to 1200 MHz")


def test_another_package_of_its_name_is_told_from_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", types.ModuleType("pynvml"))
    (line,) = gpu_checks.driver_and_gpus(make_job())
    assert line.status == PROBLEM and "pip uninstall pynvml" in line.fix


def test_a_driver_that_is_too_old_for_torch_names_the_one_that_is_needed(monkeypatch):
    nvml = node()
    nvml.cuda, nvml.driver = 12040, "550.54.15"
    said = only_problem(found(monkeypatch, nvml), "driver")
    assert "550.54.15, for CUDA up to 12.4" in said and "Install driver 580 or newer" in said
    nvml.cuda = 13010  # newer is as good
    assert not [finding for finding in found(monkeypatch, nvml) if finding.fix]


def test_a_driver_of_the_same_major_version_runs_a_newer_minor_one(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    nvml = node()
    nvml.cuda = 12020
    assert not [finding for finding in found(monkeypatch, nvml) if finding.fix]


def test_partitions_of_a_gpu_are_enough_for_one_process_and_not_for_two(monkeypatch):
    assert "partitioned (MIG)" in only_problem(
        found(monkeypatch, FakeNvml(FakeGpu(mig=1)), size=2), "gpu mode"
    )
    alone = found(monkeypatch, FakeNvml(FakeGpu(mig=1)))
    assert [finding.status for finding in alone if finding.name == "gpu mode"] == [INFO]


@pytest.mark.parametrize(("option", "environment"), [(4, {}), (0, {"SLURM_GPUS_ON_NODE": "4"})])
def test_fewer_gpus_than_the_job_was_given_is_a_problem(monkeypatch, option, environment):
    nvml = FakeNvml(FakeGpu(), FakeGpu(), FakeGpu())
    said = only_problem(found(monkeypatch, nvml, gpus=option, environment=environment), "gpu count")
    assert said.startswith("3 GPUs found, 4 expected")


@pytest.mark.parametrize("links", [[], [0] * 12])
def test_boards_without_bridges_talk_over_pcie(monkeypatch, links):
    nvml = FakeNvml(*(FakeGpu("NVIDIA A40", links=list(links)) for _ in range(2)))
    (line,) = [finding for finding in found(monkeypatch, nvml) if finding.name == "nvlink"]
    assert line.status == INFO


def test_what_a_gpu_does_not_know_is_left_out(monkeypatch):
    class Silent(FakeNvml):
        def nvmlDeviceGetTotalEccErrors(self, *_):
            raise self.NVMLError(3)

        nvmlDeviceGetEccMode = nvmlDeviceGetRemappedRows = nvmlDeviceGetTotalEccErrors
        nvmlDeviceGetMaxClockInfo = nvmlDeviceGetEnforcedPowerLimit = nvmlDeviceGetTotalEccErrors

    names = [finding.name for finding in found(monkeypatch, Silent(FakeGpu()))]
    assert names == ["driver", "gpus", "gpu memory", "nvlink"]


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        (12, UNCHECKED, "no NVIDIA driver here"),
        (9, PROBLEM, "installed, but not loaded"),
        (18, PROBLEM, "have different versions"),
    ],
)
def test_a_library_that_does_not_start_says_why(monkeypatch, code, status, says):
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: [])
    (line,) = found(monkeypatch, FakeNvml(starts=code))
    assert line.status == status and says in line.found


def test_gpus_without_the_driver_s_library_are_a_container_without_it(monkeypatch):
    monkeypatch.setattr(gpu_checks.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert "--gpus all" in only_problem(found(monkeypatch, FakeNvml(starts=12)), "driver")


def test_without_nvidia_ml_py_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (line,) = gpu_checks.driver_and_gpus(make_job())
    assert line.status == PROBLEM and "pip install nvidia-ml-py" in line.fix


def test_gpus_that_torch_does_not_reach_are_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", node())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (line,) = packages.torch_gpus(make_job())
    assert line.status == PROBLEM and "built without CUDA" in line.found


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 0), True),
        (["8.0", "9.0a"], (9, 0), True),
        (["10.0f"], (10, 3), True),
        (["10.0a"], (10, 3), False),
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80", "compute_120"], (12, 1), True),
        (["sm_120"], (10, 0), False),
    ],
)
def test_which_gpus_code_runs_on(architectures, capability, runs):
    assert packages.runs_on(architectures, capability) is runs
