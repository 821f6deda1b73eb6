"""The benchmark of payloads without its model: codes on synthetic rows, and its arithmetic."""

from __future__ import annotations

import pytest
import torch

import payload
import payload_codes as codes
import payload_logits
from payload_codes import Errors

TABLES = {
    "power": codes.power(2, 24),
    "mu-law": codes.mu_law(1, 24),
    "root": codes.root_of_probability(5, 24),
    "rational": codes.rational(4, 24),
    "polynomial": codes.polynomial(5, 5, 24),
}


def rows(number: int, seed: int) -> torch.Tensor:
    """Logits as large as real ones, so that bf16 has the same error."""
    return torch.randn(number, 700, generator=torch.Generator().manual_seed(seed)) * 3 + 30


@pytest.mark.parametrize("name", TABLES)
def test_a_table_rises_from_zero_to_its_top(name):
    table = TABLES[name]
    assert table.shape == (256,) and table[0] == 0
    assert table[-1].item() == pytest.approx(24)
    assert (table.diff() > 0).all()


def test_steps_at_distance_zero_follow_the_formulas():
    assert codes.rational(4, 24)[1] == pytest.approx(4 / 255, rel=0.01)
    assert codes.polynomial(5, 5, 24)[1] == pytest.approx(5 / 255, rel=0.01)
    assert codes.root_of_probability(5, 24)[1] == pytest.approx(
        5 * (1 - torch.e ** (-24 / 5)) / 255, rel=0.01
    )


def test_companding_has_more_codes_where_the_probability_is():
    table = codes.companded(rows(200, 0))
    assert table.shape == (256,) and table[0] == 0 and (table.diff() > 0).all()
    steps = table.diff()
    near = (table[1:] > 1) & (table[1:] < 4)
    far = (table[1:] > 10) & (table[1:] < 14)
    assert steps[near].mean() < steps[far].mean() / 2


@pytest.mark.parametrize("name", TABLES)
def test_a_logit_takes_the_nearest_entry_of_the_table(name):
    table, logits = TABLES[name], rows(5, 1)
    evaluate = codes.by_table(name, table).prepare(logits)
    nearest = (codes.distance(logits).double()[..., None] - table).abs().argmin(-1)
    expected = codes.decoded("expected", 1, lambda _: -table[nearest]).prepare(logits)
    student = rows(5, 2)
    for got, wanted in zip(
        evaluate(student, student.double().log_softmax(-1)),
        expected(student, student.double().log_softmax(-1)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_the_errors_of_the_codes_have_the_known_order(monkeypatch):
    monkeypatch.setattr(codes, "BLOCK_ROWS", 9)  # several blocks, the last one shorter
    teacher, students = rows(20, 3), {"far": rows(20, 4), "near": rows(20, 3) + 0.1 * rows(20, 4)}
    exact = codes.decoded("none", 4, lambda logits: logits)
    divergences, errors = codes.measure(teacher, students, [exact, *codes.all_codes(teacher)])
    assert divergences["far"] > divergences["near"] > 0
    for student in students:
        mean = {name: of[student].mean for name, of in errors.items()}
        assert mean["none"] == 0 and errors["none"][student].cosine == pytest.approx(1)
        assert mean["float32, vcrd's loss"] < 1e-5
        assert mean["float16"] < mean["logits_8bit"] < mean["raw bf16"] < mean["raw e4m3"]
        for name in ("float16", "logits_8bit"):
            assert mean[f"{name}, vcrd's loss"] == pytest.approx(mean[name], rel=0.05, abs=2e-6)
            assert errors[name][student].cosine > errors["raw bf16"][student].cosine
        assert all(of[student].largest >= of[student].mean for of in errors.values())


def test_limits_compare_with_raw_bf16_at_each_student():
    good, raw = Errors(0.01, 0.02, 0.9999), Errors(1.0, 2.0, 0.999)
    errors = {payload.RAW: {"far": raw, "near": raw}}
    for name in payload.LARGEST_SHARE:
        errors[name] = errors[f"{name}, vcrd's loss"] = {"far": good, "near": good}
    assert len(payload.error_limits(errors)) == 16
    assert all(limit["passed"] for limit in payload.error_limits(errors))
    errors["logits_8bit"] = {"far": Errors(0.26, 0.3, 0.9999), "near": Errors(0.25, 0.3, 0.9989)}
    failed = [limit for limit in payload.error_limits(errors) if not limit["passed"]]
    assert [limit["limit"].split(":")[0] for limit in failed] == ["logits_8bit, far", "logits_8bit, near"]
    assert failed[0]["reached"] == 0.26 and failed[1]["reached"] == pytest.approx(-1e-4)


def test_every_payload_is_timed_and_compared_with_the_copy():
    times = payload.encoding_seconds(rows(4, 5), repeats=2)
    assert set(times) == {"float32", "bfloat16"}
    assert all(seconds > 0 for of in times.values() for seconds in of.values())
    limits = payload.time_limits({"float32": {"copy": 2.0, "float16": 2.0, "logits_8bit": 3.0}})
    assert [(limit["reached"], limit["passed"]) for limit in limits] == [(1.0, True), (1.5, False)]
    assert payload.time_table(times).count("\n") == 3


def test_text_is_cut_to_the_requested_positions():
    sequences = [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert payload_logits.cut(iter(sequences), 4) == [[1, 2, 3], [4]]
    assert payload_logits.cut(iter(sequences), 5) == [[1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match="positions: expected at most 8, which the text has, got 9"):
        payload_logits.cut(iter(sequences), 9)


def test_weights_are_rounded_with_one_scale_per_row():
    weight = torch.tensor([[7.0, 3.4, -1.6], [0.07, 0.034, -0.016]])
    assert payload_logits.to_4_bits(weight).tolist() == [
        pytest.approx([7, 3, -2]),
        pytest.approx([0.07, 0.03, -0.02]),
    ]
    assert (payload_logits.to_e4m3(weight) / weight - 1).abs().max() <= 1 / 16
