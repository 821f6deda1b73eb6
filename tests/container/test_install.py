"""The steps of docker/install.sh with empty packages: installed, kept and refused packages."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from fake_packages import INSTALL, NVIDIA_TORCH, Base, offer_all, run, torch_wheel, wheel


def nvidia_base(base: Base, folder: Path) -> dict[str, str]:
    """The relevant packages of an NVIDIA image: its own torch, and other versions of pinned packages."""
    has = {
        "numpy": "2.1.0",
        "packaging": "25.0",
        "rich": "14.0.0",
        "setuptools": "80.9.0",
        "pybind11": "3.0.1",
    }
    base.has(torch_wheel(folder, NVIDIA_TORCH), *(wheel(folder, n, v) for n, v in has.items()))
    return {**has, "torch": NVIDIA_TORCH}


def test_an_nvidia_image_keeps_its_packages_and_gets_the_missing_ones(base, pins, tmp_path):
    has = nvidia_base(base, tmp_path / "wheels")
    offered = offer_all(base, pins, "torch>=2.6.0", "numpy", "packaging>=24.2")
    # pip could prefer these: a release is newer than its pre-release, and the newest numpy fits as well.
    torch_wheel(base.index, "2.11.0")
    wheel(base.index, "numpy", "2.5.5")
    constraint = tmp_path / "constraint.txt"
    constraint.write_text("numpy==1.26.4\nmegatron-core==0.12.0\n")  # as in the image, where pip reads it
    # pip would treat it as installed, although its folder is not in the environment.
    elsewhere = base.unpacked(wheel(tmp_path, "megatron-core", offered["megatron-core"], ["numpy<2"]))
    done = base.run("dependencies", PIP_CONSTRAINT=str(constraint), PYTHONPATH=str(elsewhere))
    assert done.returncode == 0, done.stderr
    assert f"unchanged: torch {NVIDIA_TORCH}" in done.stdout
    assert "rich stays at 14.0.0" in done.stdout
    versions = base.versions()
    assert {name: versions[name] for name in has} == has
    assert {name: versions[name] for name in offered if name not in has} == {
        name: version for name, version in offered.items() if name not in has
    }


@pytest.mark.slow
def test_another_megatron_core_is_replaced_by_the_pin(base, pins, tmp_path):
    nvidia_base(base, tmp_path)
    base.has(wheel(tmp_path, "megatron-core", "0.15.0", ["torch"]))
    offered = offer_all(base, pins, "torch>=2.6.0")
    assert base.run("dependencies").returncode == 0
    assert base.versions()["megatron-core"] == offered["megatron-core"]


@pytest.mark.slow
def test_build_tools_that_are_too_old_are_replaced(base, pins, tmp_path):
    nvidia_base(base, tmp_path)
    base.has(wheel(tmp_path, "pybind11", "2.10.0"))
    offered = offer_all(base, pins)
    assert base.run("dependencies").returncode == 0
    assert base.versions()["pybind11"] == offered["pybind11"]
    assert base.versions()["setuptools"] == "80.9.0"


def test_a_pre_release_of_a_tool_is_as_good_as_a_release(pins):
    requirement = pins.build_tools()["setuptools"]
    assert [pins.satisfies(version, requirement) for version in ("82.0.0rc1", "68.0", "67.9")] == [
        True,
        True,
        False,
    ]


def test_a_megatron_core_that_needs_another_torch_is_refused(base, pins, tmp_path):
    has = nvidia_base(base, tmp_path)
    offer_all(base, pins, "torch>=2.12")
    torch_wheel(base.index, "2.13.0")
    done = base.run("dependencies")
    assert done.returncode == 1
    assert f"vcrd: pip could not install beside torch {NVIDIA_TORCH}" in done.stderr
    assert base.versions()["torch"] == has["torch"]


@pytest.mark.slow
def test_a_package_that_changes_files_of_torch_is_an_error(base, pins, tmp_path):
    nvidia_base(base, tmp_path)
    offer_all(base, pins)
    (ninja,) = base.index.glob("ninja-*.whl")
    wheel(base.index, "ninja", ninja.name.split("-")[1], files={"torch/version.py": "cuda = '12.8'\n"})
    done = base.run("dependencies")
    assert done.returncode == 1
    assert "vcrd: torch was replaced" in done.stderr


@pytest.mark.parametrize("step", ["dependencies", "extension"])
def test_without_torch_nothing_is_installed(base, step):
    done = base.run(step, CUDA_ARCHITECTURES="none")
    assert done.returncode == 1
    assert "torch is not installed here" in done.stderr


def test_missing_cuda_kernels_are_an_error(base, tmp_path):
    nvidia_base(base, tmp_path)
    done = base.run("extension", CUDA_ARCHITECTURES="9.0a")
    assert done.returncode == 1
    assert "vcrd: CUDA_ARCHITECTURES is 9.0a, and this torch has no CUDA" in done.stderr


def test_a_file_that_no_longer_names_a_package_is_an_error(pins, tmp_path):
    for file in pins.WANTED:
        text = (pins.REQUIREMENTS / file).read_text()
        (tmp_path / file).write_text(text.replace("transformers", "optimus"))
    with pytest.raises(SystemExit, match=r"demo\.txt names no transformers"):
        pins.wanted(tmp_path)


@pytest.mark.parametrize(
    ("steps", "sentence"), [((), "name a step"), (("instal",), "there is no step instal")]
)
def test_a_wrong_step_is_one_message(steps, sentence):
    done = run(*steps)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vcrd: {sentence}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("architectures", ["hopper", "90", "9.0a;", "", "9.0a,none", "sm_90a"])
def test_invalid_architectures_are_an_error(check, architectures):
    with pytest.raises(SystemExit, match="CUDA_ARCHITECTURES must list"):
        check.asked(architectures)


def test_the_architectures_of_an_extension_are_read_from_its_code(check, tmp_path, monkeypatch):
    elf = "ELF file    1: _C.cpython-312-x86_64-linux-gnu.1.sm_90a.cubin\nELF file    2: _C.2.sm_100.cubin\n"
    ptx = "PTX file    1: _C.cpython-312-x86_64-linux-gnu.1.sm_100.ptx\n"
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\n[ $1 = --list-elf ] && printf '%s' '{elf}' || printf '%s' '{ptx}'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    built = check.built(tmp_path / "_C.so")
    assert built == check.asked("9.0a;10.0+PTX") == {"sm_90a", "sm_100", "compute_100"}
    assert check.listed(elf, "") == check.asked("9.0a 10.0")
    assert check.asked("none") == set()


# --- the user

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes users")


@pytest.fixture
def prefix(tmp_path) -> Path:
    """The files of a root file system with users, and Ubuntu's user 1000."""
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nubuntu:x:1000:1000::/home/ubuntu:/bin/bash\n"
    )
    (etc / "group").write_text("root:x:0:\nusers:x:100:\nubuntu:x:1000:\n")
    (etc / "shadow").write_text("root:*:20000:0:99999:7:::\nubuntu:!:20000:0:99999:7:::\n")
    (etc / "gshadow").write_text("root:*::\nusers:*::\nubuntu:!::\n")
    return tmp_path


def users(prefix: Path) -> dict[str, list[str]]:
    lines = (line.split(":") for line in (prefix / "etc/passwd").read_text().splitlines())
    return {name: rest for name, *rest in lines}


@needs_root
@pytest.mark.parametrize(("uid", "gid"), [(1000, 1000), (1000, 100), (2000123456, 2000123456)])
def test_the_user_has_the_given_ids(prefix, uid, gid):
    done = run("user", PREFIX=str(prefix), USER_ID=str(uid), GROUP_ID=str(gid))
    assert done.returncode == 0, done.stderr
    found = users(prefix)
    assert found["vcrd"] == ["x", str(uid), str(gid), "", "/home/vcrd", "/bin/bash"]
    assert ("ubuntu" in found) == (uid != 1000)
    home = (prefix / "home/vcrd").stat()
    assert (home.st_uid, home.st_gid, stat.S_IMODE(home.st_mode)) == (uid, gid, 0o1777)
    group = [
        line for line in (prefix / "etc/group").read_text().splitlines() if line.split(":")[2] == str(gid)
    ]
    assert len(group) == 1
    # Without it the log of logins grows with the id, but only in the real root.
    assert "--no-log-init" in INSTALL.read_text()


@pytest.mark.parametrize("variable", ["USER_ID", "GROUP_ID"])
@pytest.mark.parametrize("value", ["0", "root", "-1", "1e3"])
def test_the_user_may_not_be_root(prefix, variable, value):
    done = run("user", PREFIX=str(prefix), **{variable: value})
    assert done.returncode == 1
    assert done.stderr == (
        f"vcrd: {variable} must be a positive integer, as the image does not run as root; got '{value}'\n"
    )
    assert "vcrd" not in users(prefix)


def test_a_home_without_write_access_is_an_error():
    done = run("check", HOME="/nonexistent")
    assert done.returncode == 1
    assert "vcrd: HOME is /nonexistent" in done.stderr
