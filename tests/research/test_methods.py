"""The methods: their weights compared with values by hand, and with the loss of vcrd."""

from __future__ import annotations

import pytest
import torch

import data
import methods as how
import tables
import tasks
import train
import vcrd
from compared import methods, named, sets
from methods import OWN, TRACES, Place
from problems import Problem
from vcrd.loss import reference
from verifiers import RIGHT

ROWS, LENGTH, VOCAB = 3, 7, 11
METHODS = {method.name: method for method in methods()}


def place(labels: bool = True, judge=None) -> Place:
    generator = torch.Generator().manual_seed(1)
    counts = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    found = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    found = torch.where(counts & (torch.rand(ROWS, LENGTH, generator=generator) < 0.8), found, -1)
    steps = torch.where(counts, torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) // 3, -1)
    return Place(
        counts,
        steps,
        found if labels else None,
        torch.where(counts, torch.randint(VOCAB, (ROWS, LENGTH), generator=generator), -1),
        {source: judge or random_verdicts for source in ("verifier", "judge", "local")},
        counts & (steps % 2 == 0),
        torch.tensor([True, False, True])[:, None].expand(ROWS, LENGTH),
        torch.where(counts, counts.long().cumsum(-1) - 1, -1),
        torch.Generator().manual_seed(2),
    )


def random_verdicts(student_action, teacher_action):
    generator = torch.Generator().manual_seed(3)
    return tuple((torch.rand(2, ROWS, LENGTH, generator=generator) < 0.6).float())


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    student, teacher = 2 * torch.randn(2, ROWS, LENGTH, VOCAB, generator=generator)
    return student.requires_grad_(), teacher


def loss(name: str, where: Place) -> torch.Tensor:
    student, teacher = logits()
    where.first_logits = student.detach().roll(1, -1)
    return how.loss_of(METHODS[name], student, teacher, where)


def observed(where: Place, divergence: str = "forward_kl") -> how.Seen:
    student, teacher = logits()
    stats = vcrd.vocab_parallel_divergence(
        student, teacher, where.labels, divergence=divergence, mask=where.counts
    )
    return how.Seen(
        stats,
        teacher,
        where.labels,
        where.counts,
        *random_verdicts(None, None),
        where.unbroken,
        where.solved,
        where.steps,
        where.position,
        where.generator,
    )


def exact(where: Place, divergence: str = "forward_kl") -> dict[str, torch.Tensor]:
    student, teacher = (each.detach().double() for each in logits())
    labels = torch.full((ROWS, LENGTH), 0) if where.labels is None else where.labels
    return reference.statistics(student, teacher, labels.clamp(min=0), name=divergence)


def mean(values: torch.Tensor, where: Place) -> float:
    return float(values.detach()[where.counts].sum() / where.counts.sum())


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("forward KL", "forward_kl"),
        ("reverse KL", "reverse_kl"),
        ("JSD", "jsd"),
        ("skewed KL", "skew_kl"),
        ("skewed reverse KL", "skew_reverse_kl"),
    ],
)
@pytest.mark.parametrize("labels", [True, False])
def test_plain_divergences_equal_the_reference(name, divergence, labels):
    where = place(labels)
    assert loss(name, where).item() == pytest.approx(
        mean(exact(where, divergence)["divergence"], where), rel=1e-5
    )


@pytest.mark.parametrize("validity", ["label", "margin", "confidence"])
def test_methods_of_vcrd_equal_the_loss_of_the_package(validity):
    where = place()
    student, teacher = logits()
    out = vcrd.validity_calibrated_kl(student, teacher, where.labels, validity=validity, mask=where.counts)
    if validity == "label":
        assert (out.weight[where.counts & (where.labels < 0)] == 1).all()
    assert loss(validity, where).item() == pytest.approx(mean(out.loss, where), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("label, sharpness 1", {"sharpness": 1.0}),
        ("label, sharpness 16", {"sharpness": 16.0}),
        ("label, 0 to 2", {"floor": 0.0, "ceiling": 2.0}),
        ("label, 0.5 to 1.5", {"floor": 0.5, "ceiling": 1.5}),
        ("confidence, sharpness 1", {"sharpness": 1.0, "validity": "confidence"}),
        ("confidence, sharpness 16", {"sharpness": 16.0, "validity": "confidence"}),
        ("JSD x label", {"divergence": "jsd"}),
        ("JSD x label, sharpness 16", {"divergence": "jsd", "sharpness": 16.0}),
        ("JSD x confidence", {"divergence": "jsd", "validity": "confidence"}),
        ("JSD x scores", {"divergence": "jsd", "validity": "scores"}),
        ("scores, 0 to 2", {"floor": 0.0, "ceiling": 2.0, "validity": "scores"}),
        ("scores, 0.5 to 1.5", {"floor": 0.5, "ceiling": 1.5, "validity": "scores"}),
    ],
)
def test_variants_are_settings_of_the_package(name, settings):
    where = place()
    student, teacher = logits()
    if settings.get("validity") == "scores":
        valid = random_verdicts(None, None)
        settings = settings | {"student_validity": valid[0], "teacher_validity": valid[1]}
    out = vcrd.validity_calibrated_kl(
        student, teacher, where.labels, mask=where.counts, **{"validity": "label", **settings}
    )
    assert loss(name, where).item() == pytest.approx(mean(out.loss, where), rel=1e-6)


def test_scores_by_token_and_by_step():
    where = place()
    student, teacher = logits()
    valid = random_verdicts(None, None)
    for name, steps in (("scores, tokens", None), ("scores, steps", where.steps)):
        out = vcrd.validity_calibrated_kl(
            student,
            teacher,
            validity="scores",
            student_validity=valid[0],
            teacher_validity=valid[1],
            steps=steps,
            mask=where.counts,
        )
        assert loss(name, where).item() == pytest.approx(mean(out.loss, where), rel=1e-6)


def test_cross_entropy_counts_where_there_is_a_label():
    where = place()
    stats = exact(where)
    ce = torch.where(where.labels >= 0, stats["cross_entropy"], 0.0)
    assert loss("hard labels", where).item() == pytest.approx(mean(ce, where), rel=1e-5)
    both = 0.5 * mean(stats["divergence"], where) + 0.5 * mean(ce, where)
    assert loss("KL + CE", where).item() == pytest.approx(both, rel=1e-5)


def test_on_own_prefixes_an_accepted_proposal_of_the_teacher_is_a_label():
    where = place(labels=False)
    student, teacher = (each.detach().double() for each in logits())
    action = teacher.argmax(-1)
    ce = -student.log_softmax(-1).gather(-1, action[..., None])[..., 0]
    ce = torch.where(random_verdicts(None, None)[1] > 0, ce, 0.0)
    assert loss("hard labels", where).item() == pytest.approx(mean(ce, where), rel=1e-5)


def test_the_bounded_divergence_takes_the_other_weights():
    where = place()
    stats = exact(where, "jsd")
    student_valid, teacher_valid = random_verdicts(None, None)
    jsd, ce = stats["divergence"], torch.where(where.labels >= 0, stats["cross_entropy"], 0.0)
    relative = 0.1 + 1.8 * torch.tensor([[0.5, 1.0], [0.0, 0.5]])[student_valid.long(), teacher_valid.long()]
    for name, expected in (
        ("JSD + CE", 0.5 * jsd + 0.5 * ce),
        ("JSD x gate", teacher_valid * jsd),
        ("JSD x scores x own", relative * teacher_valid * jsd),
        ("JSD x scores x own + CE", 0.5 * relative * teacher_valid * jsd + 0.5 * ce),
    ):
        assert loss(name, where).item() == pytest.approx(mean(expected, where), rel=1e-4)


def test_the_sets_have_only_known_methods():
    groups = {name: method.group for name, method in METHODS.items()}
    for word, names in sets().items():
        assert {method.name for method in named(word)} == names <= METHODS.keys()
    assert {groups[name] for name in sets()["usual"]} == {"baseline", "vcrd", "control", "idea"}
    assert frozenset().union(*sets().values()) == METHODS.keys()
    assert {name for pair in tables.GAINS for name in pair} <= sets()["gains"] | sets()["variants"]
    assert [method.name for method in named("margin; forward KL")] == ["forward KL", "margin"]
    assert {method.name for method in named("margin; claims; weighting")} == {
        "margin",
        *sets()["claims"],
        *sets()["weighting"],
    }


def test_weights_of_the_others_by_hand():
    where = place()
    student, teacher = (each.detach().double() for each in logits())
    q, p = student.softmax(-1), teacher.softmax(-1)
    stats = exact(where)
    kl = stats["divergence"]
    entropy = [-(each * each.log()).sum(-1) for each in (q, p)]
    assert loss("entropy gap", where).item() == pytest.approx(
        mean((entropy[0] - entropy[1]).sigmoid() * kl, where), rel=1e-5
    )
    best = teacher.topk(5, -1).indices
    taken = (best == student.argmax(-1)[..., None]).any(-1)
    assert 0 < taken.double().mean() < 1
    assert loss("top-5 accepted", where).item() == pytest.approx(mean(taken * kl, where), rel=1e-5)
    label = where.labels.clamp(min=0)[..., None]
    wrong = (p.amax(-1) > 2 * p.gather(-1, label)[..., 0]) & (where.labels >= 0)
    assert loss("visibly wrong dropped", where).item() == pytest.approx(mean(~wrong * kl, where), rel=1e-5)
    valid = random_verdicts(None, None)
    assert loss("scores, gate", where).item() == pytest.approx(mean(valid[1] * kl, where), rel=1e-5)
    capped = torch.where(valid[0] > valid[1], 0.0, 1.0)
    assert loss("scores, capped", where).item() == pytest.approx(mean(capped * kl, where), rel=1e-5)
    relative = torch.where(valid[0] > 0, 1.0, 1.9) * valid[1]
    assert loss("scores x own", where).item() == pytest.approx(mean(relative * kl, where), rel=1e-5)
    assert loss("until the first error", where).item() == pytest.approx(
        mean(where.unbroken * kl, where), rel=1e-5
    )
    ce = torch.where(where.labels >= 0, stats["cross_entropy"], 0.0)
    both = 0.5 * mean(relative * kl, where) + 0.5 * mean(ce, where)
    assert loss("scores x own + CE", where).item() == pytest.approx(both, rel=1e-5)
    corrected = valid[1] * (1 - valid[0])
    assert loss("scores, corrections only", where).item() == pytest.approx(
        mean(corrected * kl, where), rel=1e-5
    )


def test_shuffled_weights_are_the_same_weights_at_other_tokens():
    where = place()
    seen = observed(where)
    own, moved = METHODS["label"].weights(seen), METHODS["label, shuffled"].weights(seen)
    assert torch.equal(own[where.counts].sort().values, moved[where.counts].sort().values)
    assert not torch.equal(own, moved) and not moved[~where.counts].any()
    turned = METHODS["label, reversed"].weights(seen)
    assert torch.allclose((own + turned)[where.counts], torch.tensor(2.0))
    normalised = METHODS["label, mean"].weights(seen)
    with_verdict = where.counts & (where.labels >= 0)
    ratio = (normalised / own)[with_verdict]
    assert torch.allclose(ratio, ratio[0])


def test_the_weights_of_the_first_student_do_not_change():
    where = place()
    student, teacher = logits()
    where.first_logits = student.detach().roll(1, -1)
    found = how.loss_of(METHODS["label, first student"], student, teacher, where)
    weight = vcrd.validity_calibrated_kl(where.first_logits, teacher, where.labels, mask=where.counts).weight
    assert found.item() == pytest.approx(mean(weight * exact(where)["divergence"], where), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_finite_gradient_in_its_regimes(name):
    for regime in METHODS[name].regimes:
        where = place(labels=regime == TRACES)
        student, teacher = logits()
        where.first_logits = student.detach()
        how.loss_of(METHODS[name], student, teacher, where).backward()
        assert student.grad.isfinite().all() and student.grad.abs().sum() > 0
        assert not student.grad[~where.counts].any()


def test_only_methods_that_declare_it_use_a_verifier():
    def refuses(*_):
        raise AssertionError("asked")

    for name, method in METHODS.items():
        if "verifier" not in method.asks:
            loss(name, place(judge=refuses))
            if OWN in method.regimes and "labels" not in method.asks:
                loss(name, place(labels=False, judge=refuses))


def test_tokens_are_unbroken_up_to_the_first_error():
    problems = [Problem("1a+2b-3?", tasks.Chain(1, (("a", "+", 2), ("b", "-", 3))))] * 2
    batch = data.batch_of(problems, ["a1+2=4;b4-3=1;=1$", "a2+1=3;b3-3=0;=0$"], (1, 2))
    marked = train._marked(batch.part(0))
    where = train._place(marked, OWN, torch.Generator(), RIGHT, None)
    assert where.labels is None
    assert where.unbroken[0].sum() == len("a1+2=4")  # the error itself is still after what is correct
    assert torch.equal(where.unbroken[1], where.counts[1])
    assert where.solved[:, 0].tolist() == [False, True]
    assert where.position[1][where.counts[1]].tolist() == list(range(len("a2+1=3;b3-3=0;=0$")))
    labels = train._place(marked, TRACES, torch.Generator(), RIGHT, None).labels
    assert data.decode(labels[0][labels[0] >= 0].tolist()) == "a1+2="
