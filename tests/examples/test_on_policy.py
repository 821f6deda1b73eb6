"""The on-policy example: the sampler against a step-by-step reference, scores and masks, resuming, and a whole run."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import on_policy_jobs as jobs
import pytest
import torch
from ports import free_port
from worlds import World, run_worlds

from examples.on_policy.problems import LENGTH, draw, is_right, micro_batches, right_steps, solution
from examples.verified.arithmetic import PADDING, SYMBOLS, Chain, correct_next, encode
from vcrd.settings import DistillSettings, LinkSettings

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [(0.0, 0), (1.0, 3), (1.0, 4), (0.3, 3)]  # temperature, seed


def test_samples_are_those_of_each_row_alone_on_every_rank_and_in_every_layout():
    alone, split = run_worlds(
        World(jobs.both, arguments=(OPTIONS,)),
        World(jobs.many_samples, 4, tensor=2, pipeline=2, arguments=(OPTIONS,)),
    )
    pairs, refusals = alone[0]
    found = [samples for samples, _ in pairs]
    for samples, expected in pairs:
        assert samples == expected
    assert split == [found] * 4
    greedy, one, other, cold = found
    assert one != other and one != cold and greedy != one
    assert greedy[0] == greedy[4]  # equal prompts
    assert one[0] != one[4]  # with chances of their own
    rows = [row for samples in found for row in samples]
    ended = [row for row in rows if jobs.END in row]
    assert ended and all(row.index(jobs.END) == len(row) - 1 for row in ended)
    for samples in found:
        for prompt, row in zip(jobs.PROMPTS, samples, strict=True):
            assert row[-1] == jobs.END or len(prompt) + len(row) == jobs.LENGTH
    assert len(rows) > len(ended)  # both ways to end occur
    assert refusals == [
        "prompts: expected at least one, each of 1 to 13 tokens, got lengths []",
        "prompts: expected at least one, each of 1 to 13 tokens, got lengths [0, 1]",
        "prompts: expected at least one, each of 1 to 13 tokens, got lengths [1, 14]",
        "sequence_parallel: expected False in a model that samples, got True",
        "context_parallel_size: expected 1 in a model that samples, got 2",
    ]


def test_steps_are_judged_as_the_verifier_judges_each_symbol():
    generator = torch.Generator().manual_seed(1)
    kinds = set()
    for chain in draw(60, generator):
        text = solution(chain)
        assert is_right(chain, text) and set(right_steps(chain, text)) == {True}
        cut = text[: int(torch.randint(len(text), (), generator=generator))]
        place = int(torch.randint(len(text), (), generator=generator))
        changed = (
            text[:place]
            + "0123456789+-*=;."[int(torch.randint(16, (), generator=generator))]
            + text[place + 1 :]
        )
        for response in (cut, changed, changed[: place + 4]):
            right = right_steps(chain, response)
            assert len(right) == len(response)
            allowed = [response[j] in correct_next(chain.prompt, response[:j]) for j in range(len(response))]
            assert is_right(chain, response) == (response.endswith(".") and all(allowed))
            # Every symbol of a right step is right; the first step with a wrong symbol, or without its end, is wrong.
            first = right.index(False) if False in right else len(right)
            assert all(allowed[:first]) and set(right[:first]) <= {True}
            step = [each for each in right[first:] if each is False]
            assert right[first:] == step + [None] * (len(right) - first - len(step))
            if step:
                text_of_step = response[first : first + len(step)]
                assert not all(allowed[first : first + len(step)]) or text_of_step[-1] not in ";."
            kinds |= set(right)
    assert kinds == {True, False, None}


def test_a_sample_becomes_megatrons_keys_with_its_scores():
    chain = Chain.parse("1+2*3?")
    response = "1+2=3;3*3=8;8"
    (batch,) = micro_batches([chain], [response], 1, teacher_validity=0.9)
    text = encode(chain.prompt + response)
    spoken = slice(len(chain.prompt) - 1, len(text) - 1)
    row = {key: value[0] for key, value in batch.items()}
    assert all(value.shape == (LENGTH,) for value in row.values())
    assert row["tokens"].tolist() == text + [PADDING] * (LENGTH - len(text))
    assert row["labels"].tolist() == text[1:] + [PADDING] * (LENGTH + 1 - len(text))
    assert row["labels"][spoken].tolist() == encode(response)
    outside = torch.ones(LENGTH, dtype=torch.bool)
    outside[spoken] = False
    assert row["loss_mask"][spoken].eq(1).all() and row["loss_mask"][outside].eq(0).all()
    student, teacher = row["vcrd_student_validity"], row["vcrd_teacher_validity"]
    assert student[spoken].tolist() == pytest.approx([1.0] * 6 + [0.0] * 6 + [0.9])
    assert teacher[spoken].tolist() == pytest.approx([0.9] * 13)
    assert student[outside].eq(1).all() and teacher[outside].eq(1).all()
    plain = micro_batches([chain] * 4, [response] * 4, 2)
    assert [batch["tokens"].shape for batch in plain] == [(2, LENGTH)] * 2
    assert not any(key.startswith("vcrd_") for key in plain[0])


def test_held_out_problems_are_never_drawn_for_training():
    generator = torch.Generator().manual_seed(2)
    trained = {chain.prompt for chain in draw(3000, generator)}
    held = {chain.prompt for chain in draw(600, generator, held_out=True)}
    assert not trained & held and len(held) > 500


def test_a_run_resumes_from_weights_optimizer_and_the_number_of_the_round():
    ((*ranks,),) = run_worlds(
        World(jobs.resumed, 4, tensor=2, pipeline=2, arguments=("on-policy, scores",)), seconds=200
    )
    for rank in ranks:
        assert rank.moved and rank.differences == 0
    # An untrained student is wrong from its first step on: weight 1.9 there, and 1 after it.
    (figures,) = {rank.figures for rank in ranks if rank.figures.tokens}
    assert 1.0 < figures.weight <= 1.9
    most = 2 * 8 * (LENGTH + 1)
    assert 0 < figures.tokens < most and math.isfinite(figures.divergence)
    assert figures.unlike_mask == 0


@pytest.mark.slow
def test_a_teacher_job_is_asked_ahead_within_a_round_and_trains_the_same_student():
    settings = DistillSettings(
        divergence="jsd",
        validity="scores",
        vocab_size=len(SYMBOLS),
        link=LinkSettings(address=f"127.0.0.1:{free_port()}", payload="float32", credits=2),
    )
    layout = {"size": 4, "tensor": 2, "pipeline": 2}
    (colocated,) = run_worlds(World(jobs.two_rounds, **layout, arguments=(None,)), seconds=250)
    linked, answers = run_worlds(
        World(jobs.two_rounds, **layout, arguments=(settings,)),
        World(jobs.teacher_job, **layout, arguments=(settings,)),
        seconds=250,
    )
    assert max(answers) >= 8  # two rounds of two updates of two micro-batches
    for mine, theirs in zip(linked, colocated, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=1e-5)


def test_the_committed_picture_has_the_gains_of_the_table_on_the_page():
    page = (ROOT / "docs/on-policy.md").read_text()
    rows = re.findall(r"^\| (?:off|on)-policy, `(\w+)` \|.*\| ([+-][0-9.]+) \|$", page, re.MULTILINE)
    shown = re.findall(r">(\w+ [+-][0-9.]+)<", (ROOT / "docs/images/on-policy.svg").read_text())
    assert len(rows) == 5 and sorted(shown) == sorted(" ".join(row) for row in rows)


@pytest.mark.slow
def test_the_command_compares_all_methods_and_draws_them(tmp_path):
    command = (
        "torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 4 -m examples.on_policy"
    )
    ended = subprocess.run(
        [sys.executable, "-m", *command.split(), "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["runs"]
    assert results["layout"] == {"tensor": 2, "pipeline": 2}
    assert [run["method"].split(",")[0] for run in runs] == ["off-policy"] * 2 + ["on-policy"] * 3
    assert {len(run["solved"]) for run in runs} == {2} and len({run["solved"][0] for run in runs}) == 1
    picture = (tmp_path / "curves.svg").read_text()
    assert "</svg>" in picture
    for run in runs:
        assert f"seed 1, {run['method']}:" in ended.stdout
