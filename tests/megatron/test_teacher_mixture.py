"""All teachers answer every token, and the student learns from the mixture of their distributions."""

from __future__ import annotations

from types import SimpleNamespace

import jobs
import made_teachers as made
import pytest
import several_jobs as several
import torch
from worlds import World, run_worlds

from examples.demo.convert import Place, to_hugging_face
from vcrd.link.question import NO_CONTEXT, Context, Question
from vcrd.loss import reference
from vcrd.loss.api import validity_calibrated_kl
from vcrd.megatron.privileged import AskedTwice
from vcrd.megatron.teachers import Teachers
from vcrd.settings import DistillSettings

WEIGHTS = (1.0, 2.5, 0.5)
MIXTURE = "math=1,code=2.5,law=0.5"


class Twice(made.Alone, AskedTwice):
    """The teachers of validity "privileged"."""


def asked(
    payloads: dict[str, str],
    teachers: tuple[str, ...] = (),
    context: Context = NO_CONTEXT,
    kind: type = made.Alone,
) -> tuple[list, Question, Teachers]:
    place = made.layout()
    sources = made.made(payloads, place)
    tokens = torch.randint(made.VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))
    question = Question(tokens, context=context, teachers=teachers)
    return (
        list(sources.values()),
        question,
        kind(sources, place, made.settings(tuple(payloads)), WEIGHTS),
    )


@pytest.mark.parametrize("payloads", [("float32",) * 3, ("hidden", "float32", "hidden")], ids=",".join)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_target_is_the_mixture_of_all_teachers(payloads, divergence):
    sources, question, teachers = asked(dict(zip(several.NAMES, payloads, strict=True)))
    assert teachers.request(question) == 0
    assert [len(each.asked) for each in sources] == [1, 1, 1]
    answer = teachers.receive(0)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 3, made.PADDED, generator=generator)
    labels = torch.randint(made.VOCAB, (8, 3), generator=generator)
    mask = torch.rand(8, 3, generator=generator) < 0.8
    student = logits.clone().requires_grad_()
    options = {"divergence": divergence, "vocab_size": made.VOCAB}
    out = answer.loss(validity_calibrated_kl, student, labels, mask=mask, **options)
    out.loss.sum().backward()
    exact = logits.double().requires_grad_()
    mixed = reference.mixed_logits([each.logits(question) for each in sources], list(WEIGHTS))
    stats = reference.statistics(exact, mixed, labels, name=divergence, vocab_size=made.VOCAB, mask=mask)
    weight, _ = reference.weights(*reference.log_validities(stats, "label"), mask=mask)
    loss = weight * stats["divergence"]
    loss.sum().backward()
    torch.testing.assert_close(out.loss.double(), loss, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=2e-5, rtol=2e-4)


def test_the_judge_of_a_mixture_is_the_mixture_of_teachers_that_see_the_context():
    payloads = dict(zip(several.NAMES, ("hidden", "float32", "float32"), strict=True))
    context = Context(torch.tensor([3, 7, 11, 4]), torch.tensor([0, 8, 9, 20]))
    sources, question, teachers = asked(payloads, context=context, kind=Twice)
    assert teachers.request(question) == 0
    answer, judge = teachers.receive(0)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 3, made.PADDED, generator=generator)
    labels = torch.randint(made.VOCAB, (8, 3), generator=generator)
    student = logits.clone().requires_grad_()
    options = {"validity": "privileged", "vocab_size": made.VOCAB}
    out = answer.loss(validity_calibrated_kl, student, labels, mask=None, judge=judge, **options)
    out.loss.sum().backward()
    exact = logits.double().requires_grad_()
    p, seen = (
        reference.mixed_logits([each.logits(one) for each in sources], list(WEIGHTS))
        for one in (question._replace(context=NO_CONTEXT), question)
    )
    stats = reference.statistics(exact, p, labels, vocab_size=made.VOCAB)
    verdicts = reference.privileged_log_validities(
        lambda labels: reference.statistics(seen, seen, labels, vocab_size=made.VOCAB),
        stats["student_action"],
        stats["teacher_action"],
    )
    weight, _ = reference.weights(*verdicts)
    assert (weight < 1).any() and (weight > 1).any()
    loss = weight * stats["divergence"]
    loss.sum().backward()
    torch.testing.assert_close(out.loss.double(), loss, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=2e-5, rtol=2e-4)


def test_a_sample_with_a_teacher_of_its_own_is_refused():
    *_, question, teachers = asked(dict.fromkeys(several.NAMES, "float32"), ("math", "code", "law"))
    with pytest.raises(ValueError, match="vcrd_teacher: expected none with teacher_mixture, .* got some"):
        teachers.request(question)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"teacher_mixture": "math=1"},
            "VCRD_TEACHER_MIXTURE .*: expected a weight for each teacher",
        ),
        (
            {"teacher_mixture": "math=1,code=0,law=1"},
            "VCRD_TEACHER_MIXTURE .* of code: expected a finite",
        ),
        (
            {"teacher_mixture": MIXTURE, "payload": "topk"},
            "VCRD_PAYLOAD .*: expected no teacher with the payload topk",
        ),
        (
            {"teacher_mixture": MIXTURE, "teacher_weights": "math=2"},
            "VCRD_TEACHER_WEIGHTS .*: expected none beside",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(changes, why):
    with pytest.raises(ValueError, match=why):
        DistillSettings().replaced(address="math=h:1,code=h:2,law=h:3", **changes)


def test_the_weights_are_found_by_name():
    address = "math=h:1,code=h:2,law=h:3"
    found = DistillSettings().replaced(address=address, teacher_mixture="law=0.5,code=2.5,math=1").mixture()
    assert found == WEIGHTS


def student(chosen: DistillSettings, count: int) -> SimpleNamespace:
    return jobs.student_job(chosen, count)


def direct(chosen: DistillSettings, count: int) -> SimpleNamespace:
    """Losses and gradients by the reference, in one process."""
    model = jobs.model(jobs.STUDENT, seed=1)
    teachers = [jobs.model(jobs.TEACHER, several.SEEDS[name]) for name in several.NAMES]
    losses, total = [], 0.0
    for batch in jobs.batches(count):
        tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
        positions = torch.arange(jobs.SEQUENCE).expand_as(tokens)
        q = model(tokens, positions, None)
        with torch.no_grad():
            answers = [each(tokens, positions, None)[..., : jobs.TRUE_VOCAB] for each in teachers]
        p = reference.mixed_logits(answers, list(WEIGHTS))
        stats = reference.statistics(
            q, p, labels, name=chosen.divergence, vocab_size=jobs.TRUE_VOCAB, mask=mask
        )
        weight, _ = reference.weights(*reference.log_validities(stats, chosen.validity), mask=mask)
        loss = weight * stats["divergence"]
        losses.append(loss.detach())
        total = total + (loss * mask).sum() / mask.sum() / count
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return SimpleNamespace(
        distilled=losses, gradients=to_hugging_face({Place(): gradients}, jobs.STUDENT, jobs.STUDENT.layers)
    )


@pytest.mark.parametrize(
    "changes", [{}, {"payload": "math=hidden,code=float32,law=float32", "fused_head": "on"}]
)
def test_a_student_learns_from_the_mixture_of_teacher_jobs(changes):
    count, sharpness = 3, 4.0
    chosen = several.settings(teacher_mixture=MIXTURE, sharpness=sharpness, **changes)
    students, (truth,), *served = run_worlds(
        World(student, 4, 2, 2, arguments=(chosen, count)),
        World(direct, arguments=(chosen, count)),
        *[World(several.serve, arguments=(chosen, name)) for name in several.NAMES],
    )
    for rank in (rank for rank in students if rank.has_loss):
        for loss, expected in zip(rank.distilled, truth.distilled, strict=True):
            torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)
        assert rank.figures.teachers == () and rank.figures.divergence > 0
    shards = {place: part for rank in students for place, part in rank.gradients.items()}
    gradients = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
    for name, expected in truth.gradients.items():
        scale = expected.abs().max()
        torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=2e-4, rtol=0, msg=name)
    assert served == [[2 * count]] * 3  # in training and in the measurement after it
