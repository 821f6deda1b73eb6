"""The tokens that count are those of the script's loss, wherever it keeps its mask; what is not known is said."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import jobs
import mask_jobs
import pytest
import torch
from worlds import World, run_worlds

from vcrd.megatron.report import Report
from vcrd.settings import DistillSettings

SETTINGS = {
    "plain": DistillSettings(vocab_size=jobs.TRUE_VOCAB),
    "steps": DistillSettings(vocab_size=jobs.TRUE_VOCAB),  # and steps of reasoning in the data
    "mean": DistillSettings(vocab_size=jobs.TRUE_VOCAB, normalization="mean", validity="margin"),
    "gap": DistillSettings(vocab_size=jobs.TRUE_VOCAB, normalization="mass", weighting="gap"),
    "fused": DistillSettings(vocab_size=jobs.TRUE_VOCAB, fused_head="on"),
}


def check(run: SimpleNamespace, truth: SimpleNamespace) -> None:
    assert run.error is None
    for loss, expected in zip(run.losses, truth.losses, strict=True):
        torch.testing.assert_close(loss.double(), expected, atol=5e-5, rtol=5e-5)
    scale = truth.norm.abs().max()
    torch.testing.assert_close(run.norm / scale, truth.norm / scale, atol=2e-4, rtol=0)


def in_every_place() -> dict[tuple[str, str], tuple[SimpleNamespace, SimpleNamespace]]:
    """Runs of one micro-batch by setting and place of the mask, each with the reference's."""
    found = {}
    for name, settings in SETTINGS.items():
        data = mask_jobs.batches(1, reasoning=name == "steps")
        truth = mask_jobs.direct(settings, data)
        for place in mask_jobs.PLACES:
            found[name, place] = mask_jobs.step(settings, place, data=data), truth
    return found


@pytest.fixture(scope="module")
def one_process():
    ((runs,),) = run_worlds(World(in_every_place))
    return runs


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("place", ["model", "batch", "labels"])
def test_losses_gradients_and_figures_are_of_the_tokens_that_count(one_process, name, place):
    run, truth = one_process[name, place]
    check(run, truth)
    assert run.figures.tokens == 14 and run.figures.unlike_mask == 0
    assert run.figures.loss == pytest.approx(float(truth.losses[0].sum()) / 14, rel=1e-4)
    assert run.warnings == []


def test_a_mask_that_the_script_alone_knows_is_said_at_once_and_what_needs_it_is_refused(one_process):
    for name in ("plain", "fused"):
        run, truth = one_process[name, "script"]
        assert run.error is None and run.figures.tokens == 24 and run.figures.unlike_mask == 10
        # Each token's own loss does not depend on the mask, and loss_func multiplies the others by 0.
        counted = mask_jobs.batches(1)[0]["loss_mask"] != 0
        torch.testing.assert_close(
            run.losses[0][counted].double(), truth.losses[0][counted], atol=5e-5, rtol=5e-5
        )
        scale = truth.norm.abs().max()
        torch.testing.assert_close(run.norm / scale, truth.norm / scale, atol=2e-4, rtol=0)
        first, second = run.warnings
        assert first.startswith(
            "loss_mask: the model is given none, the micro-batch has none (loss_mask: expected in "
        )
        assert "got the keys ['labels', 'tokens']" in first
        assert "reasoning steps, the weighting 'gap' and normalizations are refused" in first
        assert second.startswith(
            "loss_mask: expected the tokens that count in loss_func, got others: for 10 tokens "
        )
    for name, what in (
        ("steps", "steps"),
        ("mean", "normalization 'mean'"),
        ("gap", "weighting 'gap'"),
    ):
        run, _ = one_process[name, "script"]
        assert run.error.startswith(
            f"loss_mask: expected one for {what}, by which a token's weight depends on "
        )
        assert run.losses == []


def without_masks(found: list[dict]) -> list[dict]:
    """And without steps: as on a tensor rank whose iterator nobody should have to ask."""
    return [{key: value for key, value in batch.items() if key in ("tokens", "labels")} for batch in found]


def on_one_of_two_tensor_ranks(place: str) -> SimpleNamespace:
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() == 0
    seen = {} if first else {"seen": without_masks}
    return mask_jobs.step(SETTINGS["steps"], place, 3, data=mask_jobs.batches(3, reasoning=True), **seen)


def test_tensor_ranks_learn_the_mask_of_each_micro_batch_from_the_first():
    pipelines, ((truth,),) = (
        run_worlds(World(on_one_of_two_tensor_ranks, 4, tensor=2, pipeline=2, arguments=("batch",))),
        run_worlds(
            World(mask_jobs.direct, arguments=(SETTINGS["steps"], mask_jobs.batches(3, reasoning=True)))
        ),
    )
    last = [run for run in pipelines[0] if run.norm is not None]
    assert len(last) == 2
    for run in last:
        check(run, truth)
        assert run.figures.tokens == 14 + 5 + 23
    assert [run.error for run in pipelines[0]] == [None] * 4


def test_a_mask_that_is_not_known_is_refused_on_every_tensor_rank():
    (ranks,) = run_worlds(World(on_one_of_two_tensor_ranks, 2, tensor=2, arguments=("script",)))
    assert ranks[0].error == ranks[1].error
    assert ranks[0].error.startswith("loss_mask: expected one for steps, by which ")


def one_data_rank_of_two_masks() -> list[SimpleNamespace]:
    """Data rank 0's tokens count all of them, so its labels have no sign of a mask; then only rank 0 has masks."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    data = mask_jobs.batches(1, rank, kept=(24,) if rank == 0 else (14,), reasoning=True)
    seen = {} if rank == 0 else {"seen": without_masks}
    return [
        mask_jobs.step(SETTINGS["steps"], "labels", data=data),
        mask_jobs.step(SETTINGS["plain"], "batch", data=data, **seen),
        mask_jobs.step(SETTINGS["plain"], "model", data=data, **seen),
    ]


def test_data_ranks_agree_on_where_the_mask_is_and_whether_there_are_steps():
    (ranks,) = run_worlds(World(one_data_rank_of_two_masks, 2))
    for by_labels, mixed, steps_on_one in ranks:
        assert by_labels.error is None and by_labels.figures.tokens == 24 + 14
        assert mixed.error.startswith(
            "loss_mask: expected one in the micro-batches of every data-parallel rank or of none, got one on some"
        )
        assert steps_on_one.error == (
            "vcrd_steps: expected in the micro-batches of every data-parallel rank or of none, got them on some"
        )


def steps_that_go_or_come() -> list[SimpleNamespace]:
    without, with_steps = (mask_jobs.batches(2, reasoning=reasoning) for reasoning in (False, True))
    return [
        mask_jobs.step(SETTINGS["plain"], "model", 2, data=[with_steps[0], without[1]]),
        mask_jobs.step(SETTINGS["plain"], "model", 2, data=[without[0], with_steps[1]]),
    ]


def test_steps_that_not_every_micro_batch_has_are_refused():
    (((gone, late),),) = run_worlds(World(steps_that_go_or_come))
    assert gone.error.startswith("vcrd_steps: expected in the micro-batch, a tensor [2, 12], got the keys ")
    assert late.error == (
        "vcrd_steps: expected in every micro-batch or in none, got them in one, and none in the first"
    )


def masks_that_go_or_differ() -> dict[str, SimpleNamespace]:
    from unittest.mock import patch

    data = mask_jobs.batches(2)
    other = [{**batch, "loss_mask": 1 - batch["loss_mask"]} for batch in data]
    plain, of = SETTINGS["plain"], mask_jobs.forward_step_of

    def given_once(place, data, losses):
        steps = [of("model", data[:1], losses), of("batch", data[1:], losses)]
        return lambda iterator, model: steps.pop(0)(iterator, model)

    found = {
        "goes from the batch": mask_jobs.step(
            plain, "batch", 2, data=data, seen=lambda batches: batches[:1] + without_masks(batches[1:])
        ),
        "differs": mask_jobs.step(plain, "batch", 2, data=data, seen=lambda _: other),
        "no dict": mask_jobs.step(plain, "batch", 2, data=data, seen=lambda found: map(UserDict, found)),
    }
    flat = [{**batch, "loss_mask": batch["loss_mask"].flatten()} for batch in data]
    found["flat in the model"] = mask_jobs.step(plain, "model", 2, data=flat)
    found["flat in the batch"] = mask_jobs.step(plain, "batch", 2, data=data, seen=lambda _: flat)
    with patch.object(mask_jobs, "forward_step_of", given_once):
        found["goes from the model"] = mask_jobs.step(plain, "batch", 2, data=data)
    return found


def test_a_mask_that_goes_is_refused_and_another_than_the_losses_is_said():
    ((found,),) = run_worlds(World(masks_that_go_or_differ))
    assert found["goes from the model"].error == (
        "loss_mask: expected one with every micro-batch, as with the first, got None"
    )
    assert found["goes from the batch"].error == (
        "loss_mask: expected in the micro-batch, got the keys ['labels', 'tokens']"
    )
    assert found["no dict"].error is None and found["no dict"].figures.tokens == 14 + 5
    assert found["flat in the model"].error == "loss_mask: expected the labels' shape [2, 12], got [24]"
    assert "expected a tensor [b, s] in the micro-batch, got [24])" in found["flat in the batch"].warnings[0]
    assert found["differs"].error is None and found["differs"].figures.unlike_mask == 48
    said = [text for text in found["differs"].warnings if text.startswith("loss_mask: ")]
    assert len(said) == 1 and "for 48 tokens the gradient of the loss is 0" in said[0]


def context_parallel_mask(edges: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's part of a mask that rides in the micro-batch, its columns, and the whole."""
    import external_validity_jobs
    import torch.distributed as dist

    from vcrd.link.plan import context_rows
    from vcrd.megatron.external_validity import ExternalValidity

    rank, size = dist.get_rank(), dist.get_world_size()
    rows = 1 if edges else 2
    mask = torch.arange(rows * 24.0).view(rows, 24)
    batch = {"tokens": torch.zeros(rows, 24, dtype=torch.long), "loss_mask": mask}
    if edges:
        batch["cu_seqlens"] = torch.tensor([edges])
    external = ExternalValidity(DistillSettings(), "tokens", None)
    external.place(external_validity_jobs.layout(context=(rank, size)))
    external.take_mask()
    next(external.watched(iter([batch])))
    spans = context_rows(24, rank, size, edges)
    columns = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    labels = torch.zeros(rows, 24 // size, dtype=torch.long)
    return external.arguments(labels, None)["loss_mask"], columns, mask


@pytest.mark.parametrize("edges", [[], [0, 8, 24]])
def test_context_parallel_ranks_have_their_part_of_the_mask(edges):
    (ranks,) = run_worlds(World(context_parallel_mask, 2, arguments=(edges,)))
    for found, columns, mask in ranks:
        assert torch.equal(found, mask[:, columns])


def numbers_of_tokens() -> dict[str, SimpleNamespace]:
    plain = SETTINGS["plain"]
    even, uneven = mask_jobs.batches(4, kept=(14,)), mask_jobs.batches(4)
    return {
        "even": mask_jobs.step(plain, "model", 2, 2, data=even),
        "uneven": mask_jobs.step(plain, "model", 2, 2, data=uneven),
        "measured": mask_jobs.step(plain, "model", 2, 2, data=uneven, measured_first=True),
        "per token": mask_jobs.step(plain, "model", 2, 2, data=uneven, calculate_per_token_loss=True),
    }


def test_micro_batches_of_different_numbers_of_tokens_are_said_once():
    ((found,),) = run_worlds(World(numbers_of_tokens))
    assert found["even"].warnings == [] and found["per token"].warnings == []
    (said,), (again,) = found["uneven"].warnings, found["measured"].warnings
    assert again.startswith(said.split(" (")[0])
    assert said.startswith(
        "the micro-batches hold different numbers of tokens that count (14 on average, standard"
    )
    assert "--calculate-per-token-loss" in said
    assert [found[name].figures.micro_batches for name in found] == [4, 4, 4, 4]
    assert found["even"].figures.micro_batch_deviation == 0


def numbers_of_two_data_ranks() -> SimpleNamespace:
    from megatron.core import parallel_state

    kept = (14,) if parallel_state.get_data_parallel_rank() == 0 else (13,)
    data = mask_jobs.batches(1, kept=kept)
    return mask_jobs.step(SETTINGS["plain"], "model", data=data)


def test_data_ranks_of_different_numbers_of_tokens_are_said_on_one_of_them():
    (ranks,) = run_worlds(World(numbers_of_two_data_ranks, 2))
    assert [len(run.warnings) for run in ranks] == [1, 0]
    for run in ranks:
        assert run.figures.micro_batch_tokens == 13.5 and run.figures.micro_batch_deviation == 0.5


def test_a_deviation_is_exact_for_many_micro_batches_and_a_warning_comes_once():
    report = Report()
    report.per_token_loss = False
    field = torch.ones(2**15 + 1, 1)
    stats = SimpleNamespace(
        divergence=field,
        cross_entropy=field,
        student_action=field,
        teacher_action=field,
        skipped=torch.zeros_like(field, dtype=torch.bool),
    )
    out = SimpleNamespace(loss=field, weight=field, relative_validity=field / 2, stats=stats)
    mask = torch.ones_like(field)
    with jobs.warnings() as said:
        report.add(out, mask)
        # What 2^16 micro-batches of as many tokens add up to.
        report._step = report._step * 2**16
        assert report.take().micro_batch_deviation == 0 and said == []
        for _ in range(2):
            report.add(out, mask)
            report._step = report._step * 2**16
            mask = mask.clone()
            mask[0] = 0
            report.add(out, mask)
            assert 0 < report.take().micro_batch_deviation < 0.01
            mask = torch.ones_like(field)
    assert len(said) == 1
