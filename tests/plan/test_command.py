"""`python -m vcrd plan`: its output, its errors, and the payload that it chooses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from scenarios import scenario

from vcrd.__main__ import main
from vcrd.plan.choice import choose
from vcrd.plan.costs import costs

TEACHER, STUDENT = "Qwen3-32B,tp=8,pp=2,replicas=4", "Qwen3-4B,tp=2,dp=8"


def plan(capsys, *options: str) -> str:
    assert main(["plan", "--teacher", TEACHER, "--student", STUDENT, *options]) == 0
    return capsys.readouterr().out


def refusal(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *options])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return said.err


def test_text_and_json_have_the_same_values(capsys):
    text, values = plan(capsys), json.loads(plan(capsys, "--json"))
    assert set(values["payloads"]) == {"float16", "float32", "logits_8bit", "topk", "hidden"}
    moved, taken = (text.split("\npayload ")[part].splitlines() for part in (1, 2))
    for name, cost in values["payloads"].items():
        row = next(line for line in moved if line.startswith(name + " "))
        assert re.split(r" {2,}", row)[1:3] == [f"{cost['received']:,}", f"{cost['sent']:,}"]
        row = next(line for line in taken if line.startswith(name + " "))
        assert row.split()[-5:-2] == (
            [str(cost["replicas_needed"]), "x", "16"] if cost["gpus_needed"] else ["8", "x", "16"]
        )
    best = values["best"]
    assert f"best: {best['payload']}, 64 teacher GPUs" in text
    assert all(f"not {name}: {reason}" in text for name, reason in best["against"].items())
    assert {best["payload"], *best["against"]} == set(values["payloads"])


def test_lines_are_aligned_and_fit_a_screen(capsys):
    lines = plan(capsys).splitlines()
    assert max(map(len, lines)) <= 120
    for first in [number for number, line in enumerate(lines) if line.startswith("payload ")]:
        assert len({len(line) for line in lines[first : first + 6]}) == 1


def test_the_vocabulary_is_padded_as_megatron_does(capsys):
    values = json.loads(plan(capsys, "--json"))["scenario"]
    assert (values["teacher_padded"], values["student_padded"]) == (152_576, 152_064)
    values = json.loads(plan(capsys, "--json", "--make-vocab-size-divisible-by", "1"))["scenario"]
    assert (values["teacher_padded"], values["student_padded"]) == (151_936, 151_936)


def test_a_described_model_and_gpu_equal_the_named_ones(capsys):
    named = json.loads(plan(capsys, "--json"))
    described = "params=32762123264,hidden=5120,layers=64,vocab=151936,attention=8192,tp=8,pp=2,replicas=4"
    gpu = "bf16=989,fp8=1979,memory=80,bandwidth=3350,host=64"
    options = ["--teacher", described, "--student", STUDENT, "--gpu", gpu, "--json"]
    assert main(["plan", *options]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["payloads"], got["best"]) == (named["payloads"], named["best"])


def test_numbers_may_be_written_with_an_exponent(capsys):
    student = "params=4.022468096e9,hidden=2560,layers=36,vocab=151936,attention=4096,tied=1,tp=2,dp=8"
    assert main(["plan", "--teacher", TEACHER, "--student", student, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["payloads"] == json.loads(plan(capsys, "--json"))["payloads"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"--teacher": "Qwen3-33B"},
            "--teacher: expected a known model or params=.*; did you mean Qwen3-32B?",
        ),
        ({"--teacher": "Qwen3-32B,8"}, "--teacher: expected key=value, got '8'"),
        ({"--teacher": "Qwen3-32B,tp=0"}, "--teacher tp: expected an integer of at least 1, got '0'"),
        ({"--teacher": "Qwen3-32B,tp=2.5"}, "--teacher tp: expected an integer of at least 1, got '2.5'"),
        ({"--teacher": "Qwen3-32B,tp=2,tp=4"}, "--teacher tp: expected one value, got two"),
        ({"--teacher": "Qwen3-32B,cp=2"}, "--teacher: expected keys among tp, pp, replicas, got 'cp'"),
        ({"--teacher": "Qwen3-32B,pp=65"}, "--teacher pp: expected at most the 64 layers, got 65"),
        ({"--teacher": "Qwen3-32B,replicas=3"}, "--teacher replicas: expected at most .* student, 2, got 3"),
        (
            {"--teacher": "params=1e9,hidden=64"},
            "--teacher: expected params, hidden, layers, vocab for a model without a name, got no layers, vocab",
        ),
        (
            {"--teacher": "params=1e6,hidden=64,layers=2,vocab=151936"},
            "--teacher active: expected at least the 19447808 parameters of embedding and output layer, got 1000000",
        ),
        (
            {"--teacher": "params=1e9,active=2e9,hidden=64,layers=2,vocab=9"},
            "--teacher active: expected at most params, 1000000000, got 2000000000",
        ),
        (
            {"--teacher": "params=1e9,hidden=64,layers=2,vocab=9,tied=yes"},
            "--teacher tied: expected 0 or 1, got 'yes'",
        ),
        (
            {"--student": "Llama-3.1-8B"},
            "--student: expected a model with the vocabulary of the teacher, 151936, got 128256",
        ),
        ({"--student": "Qwen3-4B,dp=2,ep=3"}, "--student ep: expected a divisor of dp x cp, 2, got 3"),
        (
            {"--student": "Qwen3-4B,cp=3,dp=2"},
            "--sequence: expected a multiple of 6, twice the cp of the student, got 4096",
        ),
        ({"--sequence": "long"}, "--sequence: expected an integer of at least 1, got 'long'"),
        ({"--micro-batch": "0"}, "--micro-batch: expected an integer of at least 1, got '0'"),
        ({"--micro-batches": "-1"}, "--micro-batches: expected an integer of at least 1, got '-1'"),
        ({"--credits": "nan"}, "--credits: expected an integer of at least 1, got 'nan'"),
        ({"--top-k": "1e6"}, "--top-k: expected at most the vocabulary, 151936, got 1000000"),
        ({"--transport": "ib"}, "--transport: expected one of auto, nccl, tcp, got 'ib'"),
        ({"--network": "inf"}, "--network: expected a positive number, got 'inf'"),
        ({"--student-mfu": "40"}, "--student-mfu: expected a number above 0 and at most 1, got '40'"),
        ({"--teacher-mfu": "0"}, "--teacher-mfu: expected a number above 0 and at most 1, got '0'"),
        ({"--cache": "0"}, "--cache: expected an integer of at least 1, got '0'"),
        ({"--cache": "1", "--disk": "-1"}, "--disk: expected a positive number, got '-1'"),
        ({"--gpu": "h1000"}, "--gpu: expected one of a100, h100, h200, b200, or bf16=989,.*, got 'h1000'"),
        (
            {"--teacher-gpu": "bf16=1"},
            "--teacher-gpu: expected bf16, memory, bandwidth, host for a GPU without a name, got no memory",
        ),
        ({"--gpu": "bf16=x,memory=1,bandwidth=1,host=1"}, "--gpu bf16: expected a positive number, got 'x'"),
        (
            {"--gpu": "tflops=3"},
            "--gpu: expected keys among bf16, memory, bandwidth, host, fp8, got 'tflops'",
        ),
        ({"--make-vocab-size-divisible-by": "x"}, "--make-vocab-size-divisible-by: expected an integer of"),
    ],
)
def test_a_wrong_option_is_one_message(capsys, options, sentence):
    options = {"--teacher": "Qwen3-32B", "--student": "Qwen3-4B,dp=2"} | options
    said = refusal(capsys, *(part for option in options.items() for part in option))
    assert re.match(rf"python -m vcrd plan: {sentence}", said), said


def test_switches_and_missing_options_have_the_same_style_of_error(capsys):
    models = ["--teacher", TEACHER, "--student", STUDENT]
    assert "--student-fp8: expected a GPU with a known FP8 peak, got a100" in refusal(
        capsys, *models, "--gpu", "a100", "--student-fp8"
    )
    assert "--student" in refusal(capsys, "--teacher", TEACHER)
    assert "--nonsense" in refusal(capsys, *models, "--nonsense")


def test_a_wrong_option_does_not_import_torch():
    """Nor does help. The command works as documented."""
    code = (
        "import sys\nfrom vcrd.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    for options in (["plan", "--help"], ["plan", "--teacher", "x", "--student", "y"]):
        ended = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
        assert ended.stdout.splitlines()[-1] in ("0 False", "2 False"), ended.stderr
    command = [sys.executable, "-m", "vcrd", "plan", "--teacher", TEACHER, "--student", STUDENT]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and "\nbest: " in ended.stdout and not ended.stderr


def best(memory: float = 80e9, **changes) -> str:
    return choose(costs(scenario(**changes)), memory).payload


def test_with_a_fast_network_the_cheapest_exact_payload_is_the_best():
    assert best(network=1e13) == "float16"


def test_a_slower_network_needs_fewer_bytes():
    """float16 takes 0.4 MB, 8 bits 0.2 MB, hidden states 0.205 MB; a student's micro-batch 10 microseconds."""
    found = {network: best(network=network) for network in (1e11, 5e10, 2e10, 2e9)}
    assert found == {1e11: "float16", 5e10: "logits_8bit", 2e10: "topk", 2e9: "topk"}


def test_a_payload_with_too_much_memory_is_ignored():
    assert best(network=1e13, memory=1.2e7) == "float16"
    assert best(network=1e13, memory=1.1e7) == "logits_8bit"
    assert best(network=1e13, memory=1.0) == "float16"  # nothing fits, so the condition is ignored


def test_a_payload_with_an_error_has_a_penalty():
    """All steps but one are equal: 8 bits must be more than 5 % shorter, top-k more than 25 %."""
    equal = [replace(cost, step_seconds=1.0, network_seconds=0.0) for cost in costs(scenario(network=1e13))]

    def with_step(payload: str, seconds: float) -> str:
        return choose(
            [replace(c, step_seconds=seconds) if c.payload == payload else c for c in equal], 80e9
        ).payload

    assert with_step("logits_8bit", 0.96) == "float16"
    assert with_step("logits_8bit", 0.94) == "logits_8bit"
    assert with_step("topk", 0.81) == "float16"
    assert with_step("topk", 0.79) == "topk"
    assert with_step("hidden", 0.99) == "hidden"
    assert with_step("hidden", 0.999) == "float16"  # equal, and float16 costs the student less
