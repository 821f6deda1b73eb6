"""Runs on megatron.training that are saved, stopped, resumed, run again and evaluated: the curve does not notice."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jobs
import pytest
from forked_scripts import Script
from ports import free_port
from worlds import World, Worlds

from vcrd.settings import DistillSettings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training is not in this megatron-core (0.19 has it, on Python 3.12)",
)

SCRIPT = Path(__file__).with_name("long_run_jobs.py")
STEPS = 6
MEGATRON = f"""
    --num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 12 --max-position-embeddings 12
    --micro-batch-size 2 --train-iters {STEPS} --lr 1e-2 --min-lr 1e-3 --lr-decay-style linear
    --eval-iters 1 --tokenizer-type NullTokenizer --vocab-size 44 --make-vocab-size-divisible-by 16
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion
    --no-rope-fusion --position-embedding-type rope --num-workers 0 --ckpt-format torch --calculate-per-token-loss
    --log-interval 2 --seed 7 --hidden-dropout 0 --attention-dropout 0
""".split()


class Run:
    """A student job and its teacher, as processes."""

    def __init__(self, folder: Path, name: str, arguments: str, size: int = 1, **environment: str) -> None:
        self.record, self.port = folder / name, free_port()
        link = {"VCRD_ADDRESS": f"127.0.0.1:{self.port}", "VCRD_PAYLOAD": "float32", "VCRD_TIMEOUT": "100"}
        link |= {"VCRD_VOCAB_SIZE": "45", "VCRD_CONNECT_TIMEOUT": "100"}
        self.settings = DistillSettings.from_environment(link)
        master = str(free_port())
        self.output = [(folder / f"{name}.{rank}.log") for rank in range(size)]
        self.students = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "USE_LIBUV": "0"}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": master, "LONG_RUN_RECORD": str(self.record)}
            command = [str(SCRIPT), *MEGATRON, *arguments.split()]
            variables = {**os.environ, **own, "LOCAL_WORLD_SIZE": str(size), **link, **environment}
            self.students.append(Script(command, variables, self.output[rank]))

    def finish(self) -> list[int]:
        """Exit codes of the student's ranks; the teacher ended well."""
        try:
            with Worlds() as worlds:
                teacher = worlds.start(World(jobs.teacher_job, arguments=(self.settings,)))
                codes = [student.wait(150) for student in self.students]
                if not any(codes):
                    worlds.wait(teacher, seconds=60)
        finally:
            for student in self.students:
                student.kill()
        return codes

    def text(self) -> str:
        return "".join(path.read_text() for path in self.output)

    def lines(self, rank: int = 0) -> list[dict]:
        return [json.loads(line) for line in Path(f"{self.record}.{rank}").read_text().splitlines()]

    def curve(self, again: bool = False, rank: int = 0) -> list[tuple[int, str]]:
        return [(x["iteration"], x["loss"]) for x in self.lines(rank) if x.get("again") == again]


def run(folder: Path, name: str, arguments: str, **options) -> Run:
    started = Run(folder, name, arguments, **options)
    codes = started.finish()
    assert not any(codes), (codes, started.text()[-6000:])
    return started


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("long_runs")


@pytest.fixture(scope="module")
def whole(folder) -> Run:
    """Uninterrupted, two micro-batches a step, evaluated in between."""
    return run(folder, "whole", "--global-batch-size 4 --eval-interval 3")


def test_evaluation_inside_training(whole):
    assert [step for step, _ in whole.curve()] == [n // 2 for n in range(2, 2 * STEPS + 2)]
    assert any("evaluated" in line for line in whole.lines())


def test_a_run_that_is_terminated_and_resumed_ends_as_the_uninterrupted_one(whole, folder):
    """SIGTERM with requests ahead in flight: Megatron saves and exits with 0, and so does the teacher."""
    checkpoint = (
        f"--global-batch-size 4 --eval-interval 3 --save {folder / 'saved'} --load {folder / 'saved'}"
    )
    arguments = f"{checkpoint} --exit-signal-handler --save-interval 100"
    first = run(folder, "first", arguments, LONG_RUN_TERMINATE="3")
    assert first.curve() == whole.curve()[: len(first.curve())] and 6 <= len(first.curve()) < 2 * STEPS
    second = run(folder, "second", arguments)
    assert first.curve() + second.curve() == whole.curve()
    assert second.lines()[-1] == whole.lines()[-1] and "weights" in whole.lines()[-1]


@pytest.mark.parametrize(
    ("draws", "loader", "more"),
    [
        # Where Megatron's own loaders start, they draw from torch's generator: there a resumed run draws others anyway.
        pytest.param("numpy random", False, "", marks=pytest.mark.slow),
        ("torch numpy random", True, ""),
        pytest.param("torch numpy random", True, "--hidden-dropout 0.1", marks=pytest.mark.slow),
        pytest.param("numpy", True, "--attention-dropout 0.1 --hidden-dropout 0.1", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_draws_the_samples_of_the_uninterrupted_one(folder, draws, loader, more):
    """From the random state of the process, evaluation too, and where a loader saves its state, as it says."""
    name = f"{draws}{more}{loader}".replace(" ", "")
    environment = {"LONG_RUN_DRAWS": draws}
    arguments = f"--global-batch-size 4 --eval-interval 2 {more}"
    if loader:
        arguments += " --dataloader-type external"
        environment["LONG_RUN_LOADER"] = str(folder / f"{name}-whole-loader")
    saving = f"--save-interval 100 --save {folder / f'{name}-whole-saved'}"
    undisturbed = run(folder, f"{name}-whole", f"{arguments} {saving}", **environment)
    if loader:
        environment["LONG_RUN_LOADER"] = str(folder / f"{name}-loader")
    arguments += f" --save {folder / f'{name}-saved'} --load {folder / f'{name}-saved'} --save-interval 3"
    first = run(
        folder,
        f"{name}-first",
        f"{arguments} --exit-signal-handler",
        LONG_RUN_TERMINATE="3",
        **environment,
    )
    assert 6 <= len(first.curve()) < 2 * STEPS
    second = run(folder, f"{name}-second", arguments, **environment)
    assert first.curve() + second.curve() == undisturbed.curve()
    if not loader:  # Megatron saves only the state of the training loader
        evaluated = [line["evaluated"] for line in first.lines() + second.lines() if "evaluated" in line]
        assert evaluated == [line["evaluated"] for line in undisturbed.lines() if "evaluated" in line]
    assert second.lines()[-1] == undisturbed.lines()[-1] and "weights" in undisturbed.lines()[-1]
    shared = "torch" in draws and "dropout" in more
    assert ("credits is 0 from now on" in undisturbed.text()) == shared


@pytest.mark.slow
def test_a_step_that_megatron_runs_again_sees_the_same_answers(whole, folder):
    """In the middle, and at the end of the data, where fewer requests are ahead than may be."""
    again = run(folder, "again", "--global-batch-size 4 --eval-interval 3", LONG_RUN_REJECT=f"3,5,{STEPS}")
    assert again.curve() == whole.curve()
    expected = [(step, loss) for step, loss in whole.curve() if step in (3, 5, STEPS)]
    assert again.curve(again=True) == expected
    assert again.lines()[-1] == whole.lines()[-1]
    assert vcrd_lines(again) == vcrd_lines(whole), "a step that is run again counts once"


@pytest.mark.slow
def test_a_step_that_is_run_again_from_its_checkpoint_sees_the_same_answers(whole, folder):
    """A fatal result that repeats: Megatron saves, exits with 16, and runs the step again when it is resumed."""
    from megatron.core.rerun_state_machine import EXIT_CODE_RESUME_TO_DISAMBIGUATE

    arguments = (
        f"--global-batch-size 4 --eval-interval 3 --ckpt-format torch_dist --save {folder / 'rejected'} "
        f"--load {folder / 'rejected'} --save-interval 100"
    )
    first = Run(folder, "rejected-1", arguments, LONG_RUN_REJECT="4", LONG_RUN_FATAL="1")
    assert first.finish() == [EXIT_CODE_RESUME_TO_DISAMBIGUATE], first.text()[-6000:]
    assert first.curve() == [(step, loss) for step, loss in whole.curve() if step <= 4]
    rejected = [(step, loss) for step, loss in whole.curve() if step == 4]
    assert first.curve(again=True) == rejected
    # On another device it would say which result was right; this is the same one, so it asks to be resumed again.
    second = Run(folder, "rejected-2", arguments, LONG_RUN_REJECT="4", LONG_RUN_FATAL="1")
    assert second.finish() == [EXIT_CODE_RESUME_TO_DISAMBIGUATE], second.text()[-6000:]
    assert second.curve(again=True) == rejected and second.curve() == []


@pytest.mark.slow
def test_an_interleaved_pipeline_runs_a_step_again_and_counts_it_once(folder):
    arguments = "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
    arguments += " --global-batch-size 4 --eval-interval 100"
    again = run(folder, "interleaved", arguments, size=2, LONG_RUN_REJECT="3,6")
    curve = again.curve(rank=1)  # the last stage
    assert [step for step, _ in curve] == [n // 2 for n in range(2, 2 * STEPS + 2)]
    assert again.curve(again=True, rank=1) == [(step, loss) for step, loss in curve if step in (3, 6)]
    logged = vcrd_lines(again)
    assert len(logged) == STEPS // 2
    for number, figures in enumerate(logged):
        mine = [
            line
            for line in again.lines(rank=1)
            if line.get("again") is False and (line["iteration"] - 1) // 2 == number
        ]
        tokens = sum(line["tokens"] for line in mine)
        assert figures["tokens"] == tokens
        loss = sum(float.fromhex(line["loss"]) for line in mine) / tokens
        assert figures["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_a_nan_of_the_students_stops_the_run(folder):
    started = Run(folder, "nan", "--global-batch-size 4 --eval-interval 100", LONG_RUN_NAN="2")
    codes = started.finish()
    assert codes[0] not in (0, None) and "NaN in the loss" in started.text()
    assert max(step for step, _ in started.curve()) == 2


def vcrd_lines(started: Run) -> list[dict[str, float]]:
    """Figures of the plug's own lines; not those that depend on the clock or on when bytes arrive."""
    found = []
    for line in started.text().splitlines():
        if line.startswith(" [vcrd] iteration"):
            parts = [part.split(": ") for part in line.split("|")[1:-1]]
            figures = {name.strip(): float(value) for name, value in parts}
            found.append({k: v for k, v in figures.items() if k not in ("teacher wait", "link bytes")})
    return found


@pytest.mark.slow
def test_figures_are_sums_over_tokens_of_the_interval_and_of_all_ranks(folder):
    """Two data-parallel ranks whose tokens differ, intervals of two steps: in the log, TensorBoard and W&B."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = f"--global-batch-size 8 --eval-interval 100 --tensorboard-dir {folder / 'events'}"
    both = run(folder, "both", arguments, size=2, LONG_RUN_WANDB=str(folder / "wandb"))
    events = EventAccumulator(str(folder / "events")).Reload()
    logged = vcrd_lines(both)
    wandb = [json.loads(line) for line in (folder / "wandb").read_text().splitlines()]
    assert len(logged) == STEPS // 2
    micro = [line for rank in range(2) for line in both.lines(rank) if "iteration" in line]
    for number, figures in enumerate(logged):
        steps = (2 * number + 1, 2 * number + 2)
        mine = [line for line in micro if line["iteration"] in steps]
        tokens = sum(line["tokens"] for line in mine)
        loss = sum(float.fromhex(line["loss"]) for line in mine) / tokens
        assert figures["tokens"] == tokens and figures["loss"] == pytest.approx(loss, rel=1e-5)
        assert figures["weight p10"] <= figures["weight p50"] <= figures["weight p90"] <= 1.95
        assert 0 < figures["student more valid"] < 1 and figures["invalid rows"] == 0
        (sent,) = [line for line in wandb if line["step"] == steps[1] and "vcrd/loss" in line]
        for name, value in figures.items():
            tag = f"vcrd/{name.replace(' ', '_')}"
            (event,) = [event for event in events.Scalars(tag) if event.step == steps[1]]
            assert event.value == pytest.approx(value, rel=1e-4, abs=1e-6) == sent[tag]
        assert sent["vcrd/link_bytes"] > 0 and sent["vcrd/teacher_wait"] >= 0
    # Of each step, through Megatron's own reduction.
    for step in range(1, STEPS + 1):
        mine = [line for line in micro if line["iteration"] == step]
        loss = sum(float.fromhex(x["loss"]) for x in mine) / sum(x["tokens"] for x in mine)
        values = {
            key: {e.step: e.value for e in events.Scalars(key)} for key in ("lm loss", "vcrd divergence")
        }
        assert values["lm loss"][step] == pytest.approx(loss, rel=1e-5)
        assert values["vcrd divergence"][step] > 0
    means = {e.step: e.value for e in events.Scalars("vcrd/divergence")}
    per_step = {e.step: e.value for e in events.Scalars("vcrd divergence")}
    for step, mean in means.items():
        counts = [sum(x["tokens"] for x in micro if x["iteration"] == n) for n in (step - 1, step)]
        expected = (per_step[step - 1] * counts[0] + per_step[step] * counts[1]) / sum(counts)
        assert mean == pytest.approx(expected, rel=1e-4)
