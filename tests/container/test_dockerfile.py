"""docker/Dockerfile, docker/install.sh and the checkout agree. The tests have no container engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_packages import NVIDIA_TORCH, ROOT, offer_all, torch_wheel

import vcrd

TEXT = (ROOT / "docker/Dockerfile").read_text()
SCRIPT = (ROOT / "docker/install.sh").read_text()
PAGE = (ROOT / "docker/README.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, with continued lines joined."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


STEPS = re.search(r"^ +([a-z |]+)\) \"\$step\" ;;$", SCRIPT, re.M)[1].split(" | ")


def test_exactly_the_steps_of_the_script_run():
    ran = [shlex.split(line) for line in arguments("RUN")]
    assert all(len(words) == 2 and words[0].endswith("docker/install.sh") for words in ran), ran
    assert sorted(words[1] for words in ran) == sorted(STEPS)
    assert all(f"\n{step}() {{\n" in SCRIPT for step in STEPS)


def test_the_arguments_are_the_variables_of_the_script():
    declared = dict(re.findall(r'"\$\{([A-Z_]+):=(\S*?)\}"', SCRIPT))
    given = dict(line.split("=", 1) for line in arguments("ARG") if "=" in line)
    for name in (
        "BASE",
        "REVISION",
        "PIP_NO_CACHE_DIR",
        "PIP_ROOT_USER_ACTION",
    ):  # set by the image, by a label or by pip
        del given[name]
    assert given == {name: declared[name] for name in ("USER_ID", "GROUP_ID", "CUDA_ARCHITECTURES")}
    # A build argument is a variable only of the steps below it.
    for name, step in [("USER_ID", "user"), ("GROUP_ID", "user"), ("CUDA_ARCHITECTURES", "extension")]:
        assert TEXT.index(f"ARG {name}=") < TEXT.index(f"docker/install.sh {step}")


def test_the_base_is_pinned_and_the_page_names_it():
    (base,) = [line.removeprefix("BASE=") for line in arguments("ARG") if line.startswith("BASE=")]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert base in PAGE


def copied() -> list[str]:
    return [source for line in arguments("COPY") for source in line.split()[:-1]]


def test_copied_files_exist_and_only_they_are_sent_to_the_engine():
    sources = {source.rstrip("/") for source in copied()}
    assert all((ROOT / source).exists() for source in sources)
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignore[0] == "*"
    sent = {str(path.relative_to(ROOT)) for line in ignore if line[0] == "!" for path in ROOT.glob(line[1:])}
    assert sent == sources
    # Built files of other environments must not get into the package of the image.
    assert {"**/*.so", "**/__pycache__"} <= set(ignore)


def test_the_files_of_the_package_are_copied_before_it_is_built():
    (listed,) = re.findall(r'^ +cp -r "\$root"/\{(.*)\} ', SCRIPT, re.M)
    assert set(listed.split(",")) <= set(before("extension"))


def before(step: str) -> list[str]:
    """The files that are copied before a step, in its folder."""
    above = TEXT[: TEXT.index(f"RUN docker/install.sh {step}\n")]
    return [
        source.rstrip("/") for line in re.findall(r"^COPY (.*)$", above, re.M) for source in line.split()[:-1]
    ]


@pytest.mark.parametrize("step", ["user", "dependencies", "extension"])
def test_a_step_needs_only_files_that_are_copied_before_it(step, base, pins, tmp_path):
    layer = tmp_path / "layer"
    for source in before(step):
        target = layer / source
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, target)
    base.has(torch_wheel(tmp_path, NVIDIA_TORCH))
    offer_all(base, pins)
    done = base.run(step, script=layer / "docker/install.sh", USER_ID="0", CUDA_ARCHITECTURES="9.0a")
    # The last message of each step with a torch without CUDA and a refused user.
    expected = {
        "user": (1, "vcrd: USER_ID must be a positive integer"),
        "dependencies": (0, ""),
        "extension": (1, "vcrd: CUDA_ARCHITECTURES is 9.0a, and this torch has no CUDA"),
    }
    status, sentence = expected[step]
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(sentence)


def test_a_change_of_the_code_does_not_reinstall_dependencies():
    assert not {"vcrd", "csrc", "examples", "setup.py", "README.md"} & set(before("dependencies"))


def test_setup_installs_the_whole_package():
    """Modules of packages, the extension, and files that setup.py names. The image would lack any other file."""
    files = [
        path for path in (ROOT / "vcrd").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    files = [path for path in files if not path.name.startswith("_C.")]  # built
    others = {path.relative_to(ROOT / "vcrd") for path in files if path.suffix != ".py"}
    assert others == {Path("report/page.html")}
    assert 'package_data={"vcrd.report": ["page.html"]}' in (ROOT / "setup.py").read_text()
    folders = {path.parent for path in files}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_it_does_not_run_as_root():
    assert arguments("USER")[-1] == "${USER_ID}:${GROUP_ID}"


def test_the_health_check_uses_the_installed_package():
    (line,) = arguments("HEALTHCHECK")
    options, command = line.split(" CMD ")
    python, safe, *rest = json.loads(command)
    assert (python, safe, *rest[:3]) == ("python3", "-P", "-m", "vcrd", "doctor")
    assert subprocess.run([sys.executable, *rest, "--help"], cwd=ROOT, capture_output=True).returncode == 0
    assert {"--interval", "--timeout", "--start-period", "--retries"} == {
        o.split("=")[0] for o in options.split()
    }


def test_labels():
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\S+?)="(.*?)"', " ".join(arguments("LABEL"))))
    assert labels["version"] == vcrd.__version__
    assert labels["base.name"] == "${BASE}" and labels["revision"] == "${REVISION}"
    # A variable of a label must be declared below FROM.
    below = TEXT[TEXT.index("\nFROM") :]
    assert "\nARG BASE\n" in below and "\nARG REVISION" in below


@pytest.mark.parametrize("path", ["rank.sh", "pretrain_vcrd.py", "serve_teacher.py"])
def test_the_batch_scripts_find_the_examples_of_the_image(path):
    """They start examples/... relative to the working directory of the container, where the image has them."""
    (found,) = (ROOT / "examples").rglob(path)
    scripts = [(ROOT / "examples/slurm" / name).read_text() for name in ("launch.sh", "env.sh")]
    assert any(str(found.relative_to(ROOT)) in script for script in scripts)
    (settled,) = re.findall(r'"\$\{CONTAINER_WORKDIR=(.*?)\}"', (ROOT / "examples/slurm/env.sh").read_text())
    assert arguments("WORKDIR")[-1] == settled
    assert "\nCOPY examples/ examples/\n" in TEXT[TEXT.index(f"\nWORKDIR {settled}\n") :]
