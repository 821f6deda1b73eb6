"""The training step of `make gpu-check`, on the CPU with a tiny model: one model, the same steps."""

from __future__ import annotations

import math
import sys

import pytest
from worlds import World, run_worlds

from benchmarks.gpu import training
from benchmarks.gpu.models import Shape
from benchmarks.gpu.training import HEAD, PLAIN, PLUG, UNFUSED, Times

SHAPE = Shape(2, 32, 64, 4, vocab=96, sequence=16, groups=2, gated=True, tied=True)


def tiny() -> tuple[dict, list]:
    """The results; and how often each answer of the teacher was used in the last block."""
    given = []
    forward = training.ReadyTeacher.forward

    def counted(teacher, input_ids):
        answer = forward(teacher, input_ids)
        given.append(answer.data_ptr())
        return answer

    training.ReadyTeacher.forward = counted
    settings = {"use_cpu_initialization": True, "bias_activation_fusion": True}
    clock = training.HostClock()
    return training.measure(SHAPE, 1, False, clock, rounds=1, steps=2, **settings), given


def test_the_losses_alternate_on_one_model():
    (((result, given),),) = run_worlds(World(tiny))
    assert result["passed"] is True
    assert list(result["step_ms"]) == [PLAIN, UNFUSED, PLUG, HEAD]
    for times in result["losses"].values():
        assert len(times["seconds"]) == 2 and min(times["seconds"]) > 0
        assert math.isfinite(times["loss"]) and times["gradient_norm"] > 0
    losses = {name: times["loss"] for name, times in result["losses"].items()}
    assert losses[PLAIN] == pytest.approx(losses[UNFUSED], rel=1e-3)
    assert losses[PLUG] == pytest.approx(losses[HEAD], rel=1e-2) and losses[PLUG] < 0.5 * losses[PLAIN]
    assert result["answer_bytes"] == 2 * 16 * 96
    # Three warm-ups, one step for the memory and two timed ones, for each plug; the answers alternate.
    assert len(given) == 12 and len(set(given)) == 2 and given[0] != given[1]
    assert given[:6] == given[6:], "both plugs end with the same answer"
    assert training.lines(result).count("\n") == 4


def found(**changes) -> dict[str, Times]:
    times = {
        name: Times([2.0, ms], 100, 1.0, 1.0) for name, ms in ((PLAIN, 2.0), (UNFUSED, 3.0), (PLUG, 2.2))
    }
    return {**times, HEAD: Times([2.0, 2.0], 50, **{"loss": 1.0, "gradient_norm": 1.0, **changes})}


def test_overhead_is_in_percent_of_the_step_with_cross_entropy():
    result = training.summary(SHAPE, 1, True, 10**9, found())
    assert result["passed"] is True and result["layers_of"] == "Transformer Engine"
    assert result["longer_percent"] == pytest.approx({PLAIN: 0, UNFUSED: 25, PLUG: 5, HEAD: 0})
    assert "1.00 B parameters" in training.lines(result)


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"gradient_norm": math.inf}, {"loss": 1.1}])
def test_a_wrong_result_fails_it(changes):
    result = training.summary(SHAPE, 1, True, 10**9, found(**changes))
    assert result["passed"] is False
    assert "WRONG" in training.lines(result)


def test_it_says_that_there_is_no_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["training", "--json", str(tmp_path / "f.json"), "--layers", "2"])
    assert training.main() == 0
    assert "finds no usable GPU" in capsys.readouterr().out
    assert '"passed": null' in (tmp_path / "f.json").read_text()
