"""The emulation itself: it computes what CUDA would, and it notices what CUDA would not forgive.

A proof by emulation is worth what the emulation notices, so every fault that it is trusted to find is planted here.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import emulated_build
import pytest


@pytest.fixture(scope="module")
def toys() -> Path:
    return emulated_build.build_toys()


def run(toys: Path, name: str, seed: int = 0) -> subprocess.CompletedProcess:
    # Compiled with the sanitizers, so nothing needs to be loaded beforehand.
    environment = {**emulated_build.environment(), "VCRD_EMULATION_SEED": str(seed)}
    del environment["LD_PRELOAD"]
    return subprocess.run([toys, name], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name", ["sums", "warps", "indices", "conversions", "barrier", "two_barriers", "syncwarp"]
)
def test_right_kernels_are_right_in_every_order(toys, name, seed):
    done = run(toys, name, seed)
    assert done.returncode == 0 and "right" in done.stdout and not done.stderr, done.stdout + done.stderr


WRONG_NUMBERS = {
    "no_barrier": "a race",
    "no_second_barrier": "a race",
    "no_syncwarp": "a race",
    "block_order": "blocks ran in another order",
    "unwritten_shared": "not a number",
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_what_depends_on_order_or_chance_comes_out_wrong(toys, name, seed):
    done = run(toys, name, seed)
    assert done.returncode == 1 and WRONG_NUMBERS[name] in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("out_of_bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("written_out_of_bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("shared_overrun", "AddressSanitizer: global-buffer-overflow"),
        ("misaligned", "misaligned address"),
        ("misaligned_hinted", "misaligned address"),
        ("misaligned_store", "misaligned address"),
        ("integer_overflow", "signed integer overflow"),
        ("stack_overflow", "AddressSanitizer: stack-overflow"),
    ],
)
def test_the_sanitizers_see_into_the_kernels(toys, name, report):
    done = run(toys, name)
    assert done.returncode not in (0, 64) and report in done.stderr, done.stdout + done.stderr
    assert "toy_faults.cuh" in done.stderr, "the report must name the line"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "returns_early",
            "divergent barrier: 63 threads wait at a barrier, 0 in a warp operation, 1 have left",
        ),
        ("different_barriers", "divergent barrier: threads of one block wait at different barriers"),
        ("barrier_and_shuffle", "divergent barrier: 1 threads wait at a barrier, 31 in a warp operation"),
        ("left_lane", "names lanes that do not take part|divergent warp operation: .* 1 have left"),
        ("absent_lane", "names lanes that do not take part"),
        ("foreign_mask", "calls it with mask 0x0000ffff, which leaves that lane out"),
        ("outside_source", "reads lane 20, which mask 0x0000ffff does not name"),
        ("different_masks", "lanes of a warp meet in different operations"),
        ("too_many_threads", "invalid configuration"),
        ("no_blocks", "invalid configuration"),
    ],
)
def test_a_fault_of_the_threads_is_a_sentence_and_an_error(toys, name, sentence, seed):
    done = run(toys, name, seed)
    assert done.returncode == 3 and re.search(sentence, done.stderr), done.stdout + done.stderr
