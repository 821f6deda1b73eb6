"""The plug: losses and gradients through Megatron's schedules and the link equal those computed directly."""

from __future__ import annotations

from types import SimpleNamespace

import jobs
import pytest
import torch
from ports import free_port
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd.link.connection import HEADER_BYTES
from vcrd.link.errors import LinkError
from vcrd.link.rendezvous import candidates
from vcrd.megatron.hooks import LossHook
from vcrd.megatron.prefetch import Prefetcher
from vcrd.megatron.report import Report
from vcrd.settings import DistillSettings, LinkSettings


def settings(**changes) -> DistillSettings:
    link = {
        "address": f"127.0.0.1:{free_port()}",
        "payload": "float32",
        "timeout": 60,
        "connect_timeout": 100,
    }
    return DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(**{**link, **changes})


def check_against_direct(students: list[SimpleNamespace], truth: SimpleNamespace, micro_batches: int) -> None:
    last = [rank for rank in students if rank.has_loss]
    assert last
    for rank in last:
        mine = slice(rank.data_rank * micro_batches, (rank.data_rank + 1) * micro_batches)
        for loss, expected in zip(rank.distilled, truth.distilled[mine], strict=True):
            torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)
        for evaluation in rank.plain:
            for loss, expected in zip(evaluation, truth.plain[mine], strict=True):
                torch.testing.assert_close(loss, expected, atol=2e-5, rtol=2e-5)
        for (number, weight), expected in zip(rank.observed, truth.weights[mine], strict=True):
            assert number >= micro_batches  # measured after the micro-batches of training
            torch.testing.assert_close(weight.t().double(), expected, atol=1e-4, rtol=1e-4)
        assert rank.own_loss_again
        before, trained, after, measured = rank.received
        assert before == 0 and trained > 0, "evaluation must ask the teacher nothing"
        # As much again, but for the header with which the teacher said, once, that it was ready.
        assert after == trained and 0 <= 2 * trained - measured <= HEADER_BYTES
        assert rank.figures.link_bytes == trained and rank.measured.link_bytes == measured - trained
    shards = {
        place: part for rank in students if rank.data_rank == 0 for place, part in rank.gradients.items()
    }
    gradients = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
    assert gradients.keys() == truth.gradients.keys()
    for name, expected in truth.gradients.items():
        scale = expected.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=2e-4, rtol=0, msg=name)


def test_one_byte_per_logit_trains_almost_alike():
    """The loss reads the codes that the link delivers. Against logits the code's own error is left, up to 0.1 nat far
    from the maximum, which a vocabulary of some dozen tokens does not average out."""
    chosen = settings(payload="logits_8bit")
    students, _, (truth,) = run_worlds(
        World(jobs.student_job, 2, tensor=2, arguments=(chosen, 2)),
        World(jobs.teacher_job, 2, tensor=2, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 2)),
    )
    for rank in students:
        for loss, expected in zip(rank.distilled, truth.distilled, strict=True):
            torch.testing.assert_close(loss.double(), expected, atol=2e-2, rtol=0.1)
    shards = {place: part for rank in students for place, part in rank.gradients.items()}
    gradients = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
    for name, expected in truth.gradients.items():
        cosine = torch.cosine_similarity(
            gradients[name].double().flatten(), expected.double().flatten(), dim=0
        )
        assert cosine > 0.995, (name, cosine)


@pytest.mark.parametrize("transport", ["auto", "fake"])
def test_tensor_and_pipeline_parallel_student_equals_direct_computation(transport):
    chosen = settings(divergence="jeffreys", ce_weight=0.25, transport=transport)
    students, _, (truth,) = run_worlds(
        World(jobs.student_job, 4, tensor=2, pipeline=2, arguments=(chosen, 3)),
        World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 3)),
    )
    check_against_direct(students, truth, 3)
    assert all(rank.figures.tokens == 0 and rank.figures.link_bytes == 0 for rank in students[:2])


def test_data_parallel_student_of_a_tensor_parallel_teacher_equals_direct_computation():
    chosen = settings(temperature=2.0, credits=0)
    students, (served, _), (truth,) = run_worlds(
        World(jobs.student_job, 2, arguments=(chosen, 2)),
        World(jobs.teacher_job, 2, tensor=2, arguments=(chosen, 1)),
        World(jobs.direct, arguments=(chosen, 2, 2)),
    )
    check_against_direct(students, truth, 2)
    assert served == 2 * 2 * 2, "two data ranks, training and measuring, two micro-batches"
    for rank in students:
        # Summed over both data ranks: tokens and means are those of the whole batch.
        losses = torch.stack(truth.distilled)
        masks = torch.stack([b["loss_mask"] for data_rank in range(2) for b in jobs.batches(2, data_rank)])
        assert rank.figures.tokens == int(masks.sum())
        assert rank.figures.loss == pytest.approx(float(losses.sum() / masks.sum()), rel=1e-4)
        assert sum(rank.figures.validity_histogram) == rank.figures.tokens
        assert 0 < rank.figures.student_more_valid < 1
        assert (losses[masks == 0] == 0).all()


def test_interleaved_pipeline_student_equals_direct_computation():
    chosen = settings(validity="margin")
    students, _, (truth,) = run_worlds(
        World(jobs.student_job, 2, pipeline=2, virtual=2, arguments=(chosen, 4, 2)),
        World(jobs.teacher_job, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 4)),
    )
    check_against_direct(students, truth, 4)


class Heads(torch.nn.Module):
    """A model as Megatron's: asks for the losses of two extra heads, then for that of the main one."""

    def __init__(self, extra: int | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(mtp_num_layers=extra)

    def compute_language_model_loss(self, labels, logits):
        return ("plain", logits)

    def forward(self, tokens, labels=None, *, loss_mask=None):
        extra = [
            self.compute_language_model_loss(labels.clone(), n)
            for n in range(self.config.mtp_num_layers or 0)
        ]
        return [*extra, self.compute_language_model_loss(labels, "main")]


@pytest.mark.parametrize("extra", [None, 2])
def test_only_the_main_head_of_a_model_is_distilled(extra):
    model, seen = Heads(extra), []
    hook = LossHook(model, lambda labels, mask, logits: seen.append((labels, mask, logits)) or "distilled")
    labels, mask = torch.zeros(1, 2), torch.ones(1, 2)
    assert model(None, labels, loss_mask=mask)[-1] == ("plain", "main")
    with hook.active():
        losses = model(None, labels=labels, loss_mask=mask)
    assert losses == [*(("plain", n) for n in range(extra or 0)), "distilled"]
    assert len(seen) == 1 and seen[0][0] is labels and seen[0][1] is mask
    hook.undo()
    assert "compute_language_model_loss" not in vars(model) and not model._forward_pre_hooks


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_looking_ahead_keeps_the_order_and_asks_for_each_micro_batch_once(ahead):
    asked = []

    def ask(question):
        asked.append(int(question.tokens[0, 0]))
        return len(asked) - 1

    iterator = Prefetcher(({"tokens": torch.tensor([[n]])} for n in range(5)), ask, ahead, "tokens")
    for n in range(5):
        assert next(iterator)["tokens"].item() == n and iterator.number == n
        assert len(asked) == min(5, n + 1 + ahead) and iterator.pending == len(asked) - n - 1
    with pytest.raises(StopIteration):
        next(iterator)
    assert asked == list(range(5))


def test_a_micro_batch_without_tokens_is_one_sentence():
    with pytest.raises(ValueError, match="expected a micro-batch with 'tokens', got the keys .'text'."):
        next(Prefetcher(iter([{"text": 1}]), lambda question: 0, 1, "tokens"))
    with pytest.raises(ValueError, match=r"expected a tensor \[b, s\] in the micro-batch, got \[3\]"):
        next(Prefetcher(iter([torch.zeros(3)]), lambda question: 0, 1, lambda batch: batch))


def test_settings_come_from_the_environment():
    found = DistillSettings.from_environment(
        {
            "VCRD_SHARPNESS": "2",
            "VCRD_ADDRESS": "host:1234",
            "VCRD_CREDITS": "5",
            "HOME": "x",
        },
        floor=0.2,
    )
    assert found == DistillSettings(
        sharpness=2.0, floor=0.2, link=LinkSettings(address="host:1234", credits=5)
    )


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"VCRD_SHARPNES": "2"}, "VCRD_SHARPNES: expected the variable of a setting .* got an unknown name"),
        ({"VCRD_CREDITS": "two"}, r"VCRD_CREDITS \(--vcrd-credits\): expected an integer, got 'two'"),
        ({"VCRD_FLOOR": "low"}, r"VCRD_FLOOR \(--vcrd-floor\): expected a number, got 'low'"),
        ({"VCRD_ADDRESS": "nowhere"}, r"VCRD_ADDRESS \(--vcrd-address\): expected host:port"),
        (
            {"VCRD_FUSED_HEAD": "some"},
            r"VCRD_FUSED_HEAD \(--vcrd-fused-head\): expected one of off, on, recompute, got 'some'",
        ),
        (
            {"VCRD_VOCAB_SIZE": "0"},
            r"VCRD_VOCAB_SIZE \(--vcrd-vocab-size\): expected an integer of at least 1 or None, got 0",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(environment, sentence):
    with pytest.raises(ValueError, match=sentence):
        DistillSettings.from_environment(environment)


def test_report_averages_over_tokens_and_not_over_micro_batches():
    report = Report()
    for tokens, value in ((1, 8.0), (3, 4.0)):
        field = torch.full((3, 1), value)
        stats = SimpleNamespace(
            divergence=field,
            cross_entropy=field,
            student_action=torch.tensor([[0], [1], [2]]),
            teacher_action=torch.tensor([[0], [9], [9]]),
            skipped=torch.zeros_like(field, dtype=torch.bool),
        )
        out = SimpleNamespace(
            loss=field, weight=field, relative_validity=torch.full((3, 1), 0.3), stats=stats
        )
        report.add(out, torch.tensor([[1.0]] * tokens + [[0.0]] * (3 - tokens)))
    figures = report.take()
    assert figures.tokens == 4 and figures.loss == 5.0 and figures.divergence == 5.0
    assert figures.agreement == 0.5 and figures.student_more_valid == 1.0
    assert figures.validity_histogram[12] == 4
    assert report.take().tokens == 0


def call_with_a_state() -> SimpleNamespace:
    """Megatron-Bridge's form of a forward step, and calls in other forms: losses, what was given, and sentences."""
    import inspect

    import mask_jobs

    from vcrd.megatron import distill

    model, state, seen = jobs.model(jobs.STUDENT, seed=1), SimpleNamespace(timers=None), []
    teacher = jobs.model(mask_jobs.TEACHER, seed=2)
    losses: list[torch.Tensor] = []

    def forward_step(state, data_iterator, model, return_schedule_plan=False):
        seen.append((state, return_schedule_plan))
        output, loss_func = jobs.plain_forward_step(losses)(data_iterator, model)
        loss_func(output)
        return output, loss_func

    plug = distill(forward_step, DistillSettings(vocab_size=jobs.TRUE_VOCAB), teacher=teacher)
    data, sentences = jobs.batches(1), []
    plug(state, iter(data), model)
    plug(state, iter(data), model, True)
    plug(state, data_iterator=iter(data), model=model, return_schedule_plan=True)
    for arguments in ((model,), (state, iter(data), "a model"), ()):
        with pytest.raises(ValueError) as error:
            plug(*arguments)
        sentences.append(str(error.value))
    plug.close()
    two = distill(
        jobs.plain_forward_step(losses), DistillSettings(vocab_size=jobs.TRUE_VOCAB), teacher=teacher
    )
    two(iter(data), model)
    two(model=model, data_iterator=iter(data))
    for output, loss_func in (two(iter(data), model), two(iter(data), model=model)):
        loss_func(output)
    two.close()
    return SimpleNamespace(
        losses=losses,
        given=[(each is state, plan) for each, plan in seen],
        sentences=sentences,
        parameters=list(inspect.signature(plug).parameters),
    )


def test_a_forward_step_may_take_a_state_before_its_data_iterator():
    ((found,),) = run_worlds(World(call_with_a_state))
    assert found.given == [(True, False), (True, True), (True, True)]
    assert len(found.losses) == 5 and all(torch.equal(loss, found.losses[0]) for loss in found.losses)
    assert found.parameters == ["state", "data_iterator", "model", "return_schedule_plan"]
    for sentence, types in zip(
        found.sentences, ("GPTModel", "SimpleNamespace, list_iterator, str", ""), strict=True
    ):
        assert sentence.startswith(
            "forward_step: expected a call with (data_iterator, model, ...) or (state, "
        )
        assert sentence.endswith(f"got positional arguments of the types ({types}) and keywords ()")


def refuse_what_cannot_be_distilled(settings: DistillSettings) -> list[str]:
    """Sentences, in order: port taken, no loss, nothing drawn, another iterator, another model."""
    import socket

    from vcrd.megatron import distill

    sentences = []

    def expect(kind: type[Exception], plug, iterator, model) -> None:
        with pytest.raises(kind) as error:
            plug(iterator, model)
        sentences.append(str(error.value))

    part = jobs.model(jobs.STUDENT, seed=1).train()
    batches = jobs.batches(8)
    step = jobs.plain_forward_step([])
    (taken,) = candidates(settings.link.address)
    with socket.create_server(taken):
        expect(LinkError, distill(step, settings), iter(batches), part)
    plug = distill(lambda iterator, model: (next(iterator), None), settings)
    expect(ValueError, plug, iter(batches), part)
    plug.close()

    plug = distill(lambda iterator, model: step(iter(batches), model), settings.replaced(name="second"))
    expect(ValueError, plug, iter(batches), part)
    plug.close()

    plug = distill(step, settings.replaced(name="third"))
    iterator = iter(batches)
    plug(iterator, part)
    plug(iterator, part)
    expect(ValueError, plug, iter(batches), part)
    expect(ValueError, plug, iter(batches), jobs.model(jobs.STUDENT, seed=1))
    plug.close()
    return sentences


def serve_names(settings: DistillSettings, names: tuple[str, ...]) -> None:
    for name in names:
        jobs.teacher_job(settings.replaced(name=name))


def test_what_cannot_be_distilled_is_one_sentence():
    chosen = settings()
    ((sentences,), _) = run_worlds(
        World(refuse_what_cannot_be_distilled, arguments=(chosen,)),
        World(serve_names, arguments=(chosen, ("vcrd", "second", "third"))),
    )
    assert len(sentences) == 5
    assert "must be a free port" in sentences[0]
    assert sentences[1].startswith("forward_step: expected one loss from labels given to the model, got 0")
    assert sentences[2].endswith("to draw one micro-batch from it per call, got none or several")
    assert "from which 2 micro-batches were asked of the teacher and not yet drawn" in sentences[3]
    assert sentences[4] == "model: expected the model that was distilled before, got another one"
