"""Megatron-Bridge's own `pretrain` and `finetune` with the plug in their unchanged step, against transformers."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import bridge_jobs
import pytest
from bridge_jobs import Run
from ports import free_port
from worlds import World

from vcrd.megatron import DistillSettings

BRIDGE = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.bridge")
pytestmark = pytest.mark.skipif(not BRIDGE, reason="Megatron-Bridge needs Python 3.12")
FIGURES = ("lm loss", "vcrd divergence", "vcrd cross entropy", "vcrd weight", "grad norm")


def settings(**changes) -> DistillSettings:
    link = {
        "address": f"127.0.0.1:{free_port()}",
        "payload": "float32",
        "timeout": 60,
        "connect_timeout": 100,
    }
    return DistillSettings().replaced(**{**link, **changes})


@pytest.fixture(scope="module")
def runner():
    """Where Bridge is imported, and the tiny models."""
    found = bridge_jobs.Runner()
    yield found
    found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("bridge")
    bridge_jobs.save_models(found)
    return found


@pytest.fixture(scope="module")
def truth(runner, folder):
    """The first step's figures, by the form of packing."""
    return {
        packed: runner.run(World(bridge_jobs.truth, tensor=0, arguments=(Run(folder, "", packed=packed),)))[
            0
        ][0]
        for packed in ("", "current")
    }


def train(runner, run: Run, teacher: Run | None = None) -> list[SimpleNamespace]:
    """What each rank of the student saw. teacher: its layout."""
    chosen = {**vars(run), "settings": run.settings or settings()}
    run = Run(**chosen)
    size = run.tensor * run.pipeline * run.context * run.data
    worlds = [World(bridge_jobs.student, size, tensor=0, arguments=(run,))]
    if run.teacher == "linked":
        teacher = Run(**{**vars(teacher or Run(run.folder, "")), "settings": run.settings})
        size = teacher.tensor * teacher.pipeline
        worlds.append(World(bridge_jobs.teacher, size, tensor=0, arguments=(teacher,)))
    return runner.run(*worlds)[0]


def check(steps: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Figures of steps on the last rank, in float32, against others."""
    assert len(steps) == len(expected)
    for found, right in zip(steps, expected, strict=True):
        assert {name: found[name] for name in FIGURES} == pytest.approx(
            {name: right[name] for name in FIGURES}, rel=2e-5
        )


@pytest.fixture(scope="module")
def long(runner, folder):
    """Tensor, pipeline and virtual pipeline parallelism; the teacher's tensor ranks behind the link."""
    run = Run(
        folder,
        "long",
        tensor=2,
        pipeline=2,
        virtual=2,
        evaluate=2,
        save_interval=2,
        settings=settings(credits=3),
    )
    return train(runner, run, Run(folder, "", tensor=2))


@pytest.fixture(scope="module")
def alone(runner, folder):
    """One process, whose loader keeps a state of its own, from which micro-batches are drawn ahead."""
    run = Run(
        folder, "alone", evaluate=2, save_interval=2, dataloader="external", settings=settings(credits=3)
    )
    return train(runner, run)[0]


def test_the_first_step_is_that_of_transformers_and_the_reference(long, alone, truth):
    assert 0 < truth[""]["tokens"] < bridge_jobs.STEP * bridge_jobs.SEQUENCE, "some tokens must not count"
    check(long[-1].steps[:1], [truth[""]])
    check([alone.steps[0]], [truth[""]])


def test_the_layout_changes_no_step_and_no_evaluation(long, alone):
    check(long[-1].steps, alone.steps)
    assert alone.steps[0]["lm loss"] != alone.steps[-1]["lm loss"]
    for found, right in zip(long[-1].evaluations, alone.evaluations, strict=True):
        assert found == pytest.approx(right, rel=2e-5)
    assert set(alone.evaluations[0]) == {"lm loss"}, "evaluation is plain cross-entropy"


def test_figures_reach_the_log_tensorboard_and_wandb(long, truth, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "long" / "tensorboard")).Reload()
    per_step = [event.value for event in events.Scalars("vcrd weight")]  # Bridge's own reduction
    assert per_step == pytest.approx([step["vcrd weight"] for step in long[-1].steps])
    tokens = {event.step: event.value for event in events.Scalars("vcrd/tokens")}
    assert list(tokens) == [2, 4], "every log interval"
    assert truth[""]["tokens"] < tokens[2] < 2 * bridge_jobs.STEP * bridge_jobs.SEQUENCE
    written = {step: values for step, values in long[-1].written if "vcrd/tokens" in values}
    assert {step: values["vcrd/tokens"] for step, values in written.items()} == tokens
    weighted = sum(step["vcrd weight"] for step in long[-1].steps[:2]) / 2
    assert written[2]["vcrd/weight"] == pytest.approx(weighted, rel=0.02)  # other numbers of tokens
    assert any("vcrd weight" in values for _, values in long[-1].written)
    assert not any("tokenizer" in said for rank in long for said in rank.said), (
        "Bridge's tokenizer is compared"
    )


@pytest.mark.parametrize("name", ["alone", "long"])
def test_a_resumed_run_goes_on_bit_for_bit(runner, folder, long, alone, name):
    if name == "long":
        run = Run(folder, "long", tensor=2, pipeline=2, virtual=2, evaluate=2, load=2)
        resumed, whole = train(runner, run, Run(folder, "", tensor=2))[-1], long[-1]
    else:
        run = Run(folder, "alone", dataloader="external", load=2, settings=settings(credits=3))
        resumed, whole = train(runner, run)[-1], alone
    assert len(resumed.steps) == 2 and resumed.steps == whole.steps[2:]


def test_checkpoints_name_functions_that_can_be_imported(long, runner, folder):
    arguments = (folder / "long" / "checkpoints" / "iter_0000004",)
    ((name,),) = runner.run(World(bridge_jobs.saved_configuration, tensor=0, arguments=arguments))
    assert name == "megatron.core.distributed.finalize_model_grads.finalize_model_grads"


def test_a_teacher_beside_the_student(runner, folder, alone):
    run = Run(folder, "beside", steps=2, teacher="beside", tensor=2, pipeline=2, form="partial")
    check(train(runner, run)[-1].steps, alone.steps[:2])


def test_groups_of_the_models_own(runner, folder, alone):
    """Neither job has Megatron's parallel state."""
    run = Run(folder, "groups", steps=2, tensor=2, own_groups=True, form="without state")
    check(train(runner, run, Run(folder, "", pipeline=2, own_groups=True))[-1].steps, alone.steps[:2])


def test_data_parallelism_with_the_overlapped_optimizer(runner, folder, alone):
    run = Run(folder, "data", steps=2, data=2)
    check(train(runner, run)[-1].steps, alone.steps[:2])


@pytest.mark.parametrize("context", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_packed_sequences(runner, folder, truth, context):
    run = Run(folder, f"packed {context}", steps=1, packed="legacy", context=context)
    check(train(runner, run)[-1].steps, [truth["current"]])


def test_context_parallelism(runner, folder, truth):
    run = Run(folder, "context", steps=1, context=2)
    check(train(runner, run)[-1].steps, [truth[""]])


def test_fine_tuning_on_packed_samples(runner, folder, truth):
    """From a converted checkpoint; a step's samples are one batch, which Bridge cuts in each step."""
    pretrained = str(folder / "pretrained")
    run = Run(
        folder, "tuned", steps=1, packed="current", dataloader="batch", pretrained=pretrained, form="object"
    )
    runner.run(World(bridge_jobs.save_pretrained, tensor=0, arguments=(run, pretrained)))
    check(train(runner, run)[-1].steps, [truth["current"]])


def test_rows_by_hand_are_those_of_the_plan():
    from vcrd.link.plan import context_rows

    for edges in ([0, 16], [0, 4, 16], [0, 8, 12, 24], [0, 12, 12, 24]):
        for size in (1, 2):
            for rank in range(size):
                spans = context_rows(edges[-1], rank, size, edges)
                ours = [row for span in spans for row in range(span.start, span.stop)]
                assert ours == bridge_jobs.rows_by_hand(edges, rank, size)


def test_bridge_finds_its_state_in_the_parameters(runner):
    ((found,),) = runner.run(World(bridge_jobs.injections, tensor=0))
    assert found == dict.fromkeys(found, True) and len(found) == 5


def test_settings_of_the_job_are_refused(runner):
    ((sentences,),) = runner.run(World(bridge_jobs.refusals, tensor=0))
    assert set(sentences) == {"inprocess_restart", "reset_position_ids", "modelopt"}
    for name, said in sentences.items():
        assert "expected" in said and "got" in said, (name, said)


def test_stand_ins_are_for_bridge_alone_and_end_with_the_block(runner):
    ((found,),) = runner.run(World(bridge_jobs.stand_ins, tensor=0))
    assert found.others_see == [] and found.left == []
    names = ("Linear", "ops.Sequential", "fp8_autocast")
    assert [said.split(":")[0] for said in found.said] == [f"transformer_engine.pytorch.{n}" for n in names]
