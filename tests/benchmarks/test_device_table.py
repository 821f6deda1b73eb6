"""The CUDA part of the benchmark without a GPU: small shapes on CPU, and its arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import device_measure
import device_methods as methods
import device_table as table
from device_measure import Case, Figures
from device_methods import Job

SMALL = Case(tokens=24, columns=515, vocab=515, dtype="bfloat16", repeats=3)
HEADLINE = Case(*table.HEADLINE, repeats=3)


def eager_kl(student, teacher, labels):
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_jsd(student, teacher, labels):
    """A mean over the tokens, as in Liger."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return terms.sum() / 2 / student.shape[0]


def out_of_memory(student, teacher, labels):
    raise torch.OutOfMemoryError("no")


OURS = [job for job in methods.JOBS if not job.beside]
PEERS = [
    Job("eager", lambda: eager_kl, "forward_kl", (methods.KL, methods.INPLACE)),
    Job("eager jsd", lambda: mean_jsd, "jsd", (methods.JSD,), mean=True),
    Job("greedy", lambda: out_of_memory, "forward_kl", (methods.KL,)),
    Job("absent", lambda: "it is not installed", "forward_kl", (methods.KL,)),
    Job("broken", lambda: 1 / 0, "forward_kl", (methods.KL,)),
]


def test_measures_every_job(tmp_path, capsys):
    path = tmp_path / "results.json"
    cases = [SMALL, replace(SMALL, columns=64, vocab=512, dtype="float32")]
    assert table.run(cases, "cpu", {"device": "test"}, path, 1000, [*OURS, *PEERS]) == 0
    printed = capsys.readouterr().out
    assert "[24, 64] (1/8)" in printed
    assert "greedy was not measured: out of memory" in printed
    assert "absent was not measured: it is not installed" in printed
    assert "broken was not measured: ZeroDivisionError" in printed
    written = json.loads(path.read_text())
    assert [record["case"]["columns"] for record in written["cases"]] == [515, 64]
    for record in written["cases"]:
        assert set(record["derived"]) == {job.name for job in OURS} | {"eager", "eager jsd"}
        for name in record["derived"]:
            figures = record["results"][name]
            assert len(figures["both"]) == 3 and all(
                0 < forward < both for forward, both in zip(figures["forward"], figures["both"], strict=True)
            )
        assert len(record["copy_seconds"]) == 3


def test_a_wrong_gradient_fails_the_run(tmp_path):
    job = Job(
        "halved", lambda: lambda *tensors: eager_kl(*tensors) / 2, "forward_kl", (methods.KL, methods.INPLACE)
    )
    path = tmp_path / "results.json"
    assert table.run([SMALL], "cpu", {}, path, 1000, [*OURS, job]) == 1
    assert "halved [24, 515] bfloat16: gradient error 5" in json.loads(path.read_text())["wrong"][0]


def test_a_loss_of_vcrd_that_does_not_run_fails_the_run(tmp_path):
    path = tmp_path / "results.json"
    assert (
        table.run(
            [SMALL], "cpu", {}, path, 1000, [Job("vcrd", lambda: out_of_memory, "forward_kl"), PEERS[0]]
        )
        == 1
    )


def test_after_the_time_limit_only_vcrd_is_measured(capsys):
    assert table.run([SMALL], "cpu", {}, None, 0, [OURS[0], PEERS[0]]) == 0
    assert "eager was not measured: the time limit of 0 s was reached" in capsys.readouterr().out


def test_every_job_keeps_the_logits():
    bench = device_measure.DeviceBench(SMALL, "cpu", device_measure.HostClock())
    for job in OURS:
        assert isinstance(bench.measure(job), Figures)
        bench._restore()
        assert torch.equal(bench.student, bench.kept)


def test_counts_ten_bytes_for_a_pair_of_bfloat16():
    forward, both = table.counted_bytes(HEADLINE)
    assert (forward, both) == (4 * 4096 * 131072, 10 * 4096 * 131072)
    assert table.counted_bytes(replace(HEADLINE, dtype="float32")) == (2 * forward, 2 * both)


def results_of(copied: float, **seconds: tuple[float, float]) -> table.Results:
    names = {
        "kl": methods.KL,
        "inplace": methods.INPLACE,
        "modelopt": methods.MODELOPT,
        "compiled": "compiled KL",
    }
    return {names[key]: Figures([f] * 3, [b] * 3, 0, 1e-3) for key, (f, b) in seconds.items()}


def limit(verdicts: list[dict], text: str) -> dict:
    return next(v for v in verdicts if v["limit"].startswith(text))


def test_limits_of_the_headline():
    # The copy takes 2 ms for 4 bytes per pair, each read and written: 8 bytes. Forward moves 4, both passes 10.
    results = results_of(2e-3, kl=(1.1e-3, 2.9e-3), inplace=(1.1e-3, 3.0e-3), modelopt=(0.02, 0.0289))
    verdicts = table.verdicts(HEADLINE, [2e-3] * 3, results)
    forward = limit(verdicts, "vcrd, forward >= 90%")
    assert forward["reached"] == pytest.approx(1 / 1.1) and forward["passed"]
    both = limit(verdicts, "vcrd, forward + backward >= 85%")
    assert both["reached"] == pytest.approx(2.5 / 2.9) and both["passed"]
    both = limit(verdicts, "vcrd in place, forward + backward >= 85%")
    assert both["reached"] == pytest.approx(2.5 / 3.0) and not both["passed"]
    modelopt = limit(verdicts, "ModelOpt / vcrd >= 10")
    assert modelopt["reached"] == pytest.approx(9.966, abs=1e-2) and not modelopt["passed"]
    assert limit(verdicts, "Liger KL / vcrd > 1")["passed"] is None


def test_limits_of_other_shapes():
    case = replace(HEADLINE, columns=16384)
    results = results_of(2e-3, kl=(1e-3, 2e-3), inplace=(1e-3, 2e-3), compiled=(1e-3, 2e-3))
    results[methods.INPLACE] = replace(results[methods.INPLACE], extra_bytes=4096 * 16384 * 2 // 5)
    verdicts = table.verdicts(case, [2e-3] * 3, results)
    assert not any("of a copy" in v["limit"] for v in verdicts)
    assert limit(verdicts, "compiled KL / vcrd > 1")["passed"] is False  # equal is not faster
    extra = limit(verdicts, "extra memory of vcrd in place <= 0.1")
    assert extra["reached"] == pytest.approx(0.2) and not extra["passed"]


def test_default_shapes():
    cases = table.default_cases(["bfloat16"], 15)
    assert len(cases) == 18
    assert (4096, 131072) in {(c.tokens, c.columns) for c in cases}
    assert {c.columns for c in cases if c.columns != c.vocab} == {4096, 16384, 19008}
    assert table.parse_shape("4096x16384of131072") == (4096, 16384, 131072)
    assert table.parse_shape("4096x131072") == (4096, 131072, 131072)
