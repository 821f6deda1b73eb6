"""Figures beside a script's own report; a rewound step on ranks that ask and on ranks that do not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jobs
import pytest
import torch
from test_distillation import settings
from worlds import World, run_worlds

from vcrd.link.student import Waits
from vcrd.megatron.layout import Groups
from vcrd.megatron.metrics import IntervalLog, scalars, with_step_sums
from vcrd.megatron.report import Report
from vcrd.megatron.teachers import Counters
from vcrd.megatron.training_loop import training_loop

SUMS = {"vcrd weight": torch.tensor([3.0, 2.0])}


def test_a_report_of_either_form_is_extended_and_the_rest_is_the_scripts():
    own = {"lm loss": torch.tensor([4.0, 2.0])}
    three = with_step_sums(lambda output, scale: (output * scale, 7, own), lambda: SUMS)(2.0, scale=3)
    assert three == (6.0, 7, {**own, **SUMS}) and "vcrd weight" not in own
    assert with_step_sums(lambda output: (output, own), lambda: SUMS)(1.0) == (1.0, {**own, **SUMS})
    assert with_step_sums(lambda output: [output], lambda: SUMS)(1.0) == [1.0]


def observed(weight: torch.Tensor, rho: torch.Tensor) -> SimpleNamespace:
    field = torch.ones_like(weight)
    stats = SimpleNamespace(
        divergence=field,
        cross_entropy=field,
        student_action=field,
        teacher_action=field,
        skipped=torch.zeros_like(field, dtype=torch.bool),
    )
    return SimpleNamespace(loss=field, weight=weight, relative_validity=rho, stats=stats)


@pytest.mark.parametrize("ceiling", [1.9, 40.0, 0.01])
def test_quantiles_of_the_weight_are_those_of_the_tokens(ceiling):
    generator = torch.Generator().manual_seed(3)
    rho = torch.rand(5000, 1, generator=generator)
    weight = 0.1 + (ceiling - 0.1) * rho
    report = Report()
    for rows in (slice(0, 100), slice(100, 5000)):
        report.add(observed(weight[rows], rho[rows]), None)
    figures = report.take()
    for share in (0.1, 0.5, 0.9, 1.0):
        exact = float(weight.flatten().double().quantile(share))
        assert figures.weight_quantile(share) == pytest.approx(exact, rel=0.03)
    values = scalars(figures, 1.5, 7.0)
    assert values["weight_p10"] == figures.weight_quantile(0.1)
    assert values["teacher_wait"] == 1.5 and values["link_bytes"] == 7.0
    assert Report().take().weight_quantile(0.5) == 0.0


def test_a_step_that_was_run_again_counts_once():
    report, half = Report(), torch.full((4, 1), 0.5)
    for repeated in (False, True, False):
        report.add(observed(half, half), None)
        assert report.last("weight").tolist() == [2.0, 4.0]
        report.end_step(repeated)
    report.add(observed(half, half), None)  # a step under way
    assert report.take().tokens == 12 and report.take().tokens == 0


def written_of_an_interval() -> dict[str, float]:
    """What this rank writes where rank r has counted r + 1 tokens, with two data ranks of two context ranks each."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    args, written = SimpleNamespace(curr_iteration=0, log_interval=1, train_iters=1), {}
    writer = SimpleNamespace(add_scalar=lambda name, value, iteration: written.update({name: value}))
    sys.modules["megatron.training.global_vars"] = SimpleNamespace(
        _GLOBAL_ARGS=args,
        get_args=lambda: args,
        get_tensorboard_writer=lambda: writer,
        get_wandb_writer=lambda: None,
    )
    teacher = SimpleNamespace(names=("",), waits=Waits(), each=lambda: [Counters(Waits(), (None, 0), 0)])
    log, report = IntervalLog(settings(), teacher), Report()
    log.begin(SimpleNamespace(groups=Groups.of(None)))
    half = torch.full((torch.distributed.get_rank() + 1, 1), 0.5)
    report.add(observed(half, half), None)
    log.end_step(report, training_loop())
    return written


def test_figures_are_of_all_data_and_context_ranks():
    (ranks,) = run_worlds(World(written_of_an_interval, 4))
    assert not any(ranks[:3]) and ranks[3]["vcrd/tokens"] == 1 + 2 + 3 + 4


def train_with_reruns(chosen, steps: int, rejected: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """Each step's losses, and again those of the steps that Megatron runs a second time; no optimizer."""
    from megatron.core import rerun_state_machine as rerun
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    model = jobs.model(jobs.STUDENT, seed=1)
    losses: list[torch.Tensor] = []
    data = jobs.batches(2 * steps)
    # As Megatron does it: ranks but the first of a tensor group have no iterator.
    asks = get_tensor_model_parallel_rank() == 0
    iterator = rerun.RerunDataIterator(iter(data)) if asks else None
    drawn: list[dict] = []

    def forward_step(data_iterator, model):
        # What Megatron's get_batch broadcasts, each rank has for itself here.
        batch = data[position[0]] if data_iterator is None else next(data_iterator)
        assert torch.equal(batch["tokens"], data[position[0]]["tokens"])
        position[0] += 1
        drawn.append(batch)
        return jobs.plain_forward_step(losses)(iter([batch]), model)

    plug = distill(forward_step, chosen)
    rerun.initialize_rerun_state_machine(mode=rerun.RerunMode.VALIDATE_RESULTS)
    machine, found, position = rerun.get_rerun_state_machine(), [], [0]
    for step in range(steps):
        while machine.should_run_forward_backward(iterator):
            position[0] = 2 * step
            losses.clear()
            get_forward_backward_func()(
                forward_step_func=plug,
                data_iterator=iterator,
                model=model,
                num_microbatches=2,
                seq_length=jobs.SEQUENCE,
                micro_batch_size=2,
                forward_only=False,
            )
            found.append([step, *losses])
            machine.validate_result(
                result=losses[-1].sum(),
                rejection_func=lambda _, step=step: step in rejected,
                message="drill",
                fatal=False,
            )
        assert not machine.should_checkpoint_and_exit()[1]
    assert plug.report.take().tokens == sum(int(batch["loss_mask"].sum()) for batch in data)
    plug.close()
    rerun.destroy_rerun_state_machine()
    return found


@pytest.mark.parametrize("credits", [3, 0])
def test_a_rewound_step_asks_again_and_gives_every_tensor_rank_its_answers(credits):
    chosen = settings(credits=credits)
    plain = settings(credits=credits)
    students, _, undisturbed, _ = run_worlds(
        World(train_with_reruns, 2, tensor=2, arguments=(chosen, 5, (1, 3, 4))),
        World(jobs.teacher_job, arguments=(chosen,)),
        World(train_with_reruns, 2, tensor=2, arguments=(plain, 5, ())),
        World(jobs.teacher_job, arguments=(plain,)),
    )
    for again, once in zip(students, undisturbed, strict=True):
        assert [step for step, *_ in again] == [0, 1, 1, 2, 3, 3, 4, 4]  # Megatron checks no first step
        assert len(once) == 5
        for step, *losses in again:
            for loss, expected in zip(losses, once[step][1:], strict=True):
                assert torch.equal(loss, expected)
