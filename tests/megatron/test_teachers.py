"""Several teachers of one micro-batch: each is asked for its own samples, and each token learns as it would alone."""

from __future__ import annotations

import random
from dataclasses import replace

import made_teachers as made
import pytest
import torch
from torch import Tensor
from worlds import World, run_worlds

from vcrd.link.errors import HandshakeRefused, LinkError
from vcrd.link.handshake import Tokenizer
from vcrd.link.plan import context_rows
from vcrd.link.question import Context, Question
from vcrd.loss import reference
from vcrd.loss.api import CalibratedLoss, validity_calibrated_kl
from vcrd.loss.divergence import DivergenceStats
from vcrd.loss.fused_head import fused_validity_calibrated_kl
from vcrd.megatron.prefetch import question_of
from vcrd.megatron.privileged import AskedTwice
from vcrd.megatron.report import Report
from vcrd.megatron.routing import Split
from vcrd.megatron.teachers import Answer, Part
from vcrd.teacher_logits import TeacherLogits

NAMES = ("math", "code", "law")
SAME = dict.fromkeys(NAMES, "float32")
MIXED = [
    {"math": "topk", "code": "float16", "law": "float16"},
    {"math": "hidden", "code": "hidden", "law": "logits_8bit"},
    {"math": "float32", "code": "float16", "law": "topk"},
]


def question(dice: random.Random, packed: bool, context_size: int = 1, contexts: bool = False) -> Question:
    """Of random shape, teachers, and context."""
    unit, count = 2 * context_size, dice.randint(1, 5)
    if packed:
        widths = [unit * dice.randint(1, 3) for _ in range(count)]
        rows, width = 1, sum(widths)
        edges = torch.tensor([0, *widths]).cumsum(0)
    else:
        rows, width = count, unit * dice.randint(1, 3)
        edges = torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(dice.randrange(10**6))
    tokens = torch.randint(made.VOCAB, (rows, width), generator=generator)
    teachers = tuple(dice.choice([dice.choice(NAMES), dice.randrange(3)]) for _ in range(count))
    if not contexts:
        return Question(tokens, edges, teachers=teachers)
    amount = dice.randint(0, 6)
    places = torch.randint(rows * width, (amount,), generator=generator).sort().values
    context = Context(torch.randint(made.VOCAB, (amount,), generator=generator), places)
    return Question(tokens, edges, context, teachers)


def owner(teacher: str | int) -> int:
    return NAMES.index(teacher) if isinstance(teacher, str) else teacher


def alone(whole: Question) -> list[tuple[int, Question, tuple[slice, slice]]]:
    """Each row, or packed sequence, by itself: its teacher, its question, and where it is in [s, b]."""
    found = []
    rows, width = whole.tokens.shape
    edges = whole.edges.tolist()
    for number, teacher in enumerate(whole.teachers):
        start, stop = (edges[number], edges[number + 1]) if edges else (number * width, (number + 1) * width)
        inside = (whole.context.places >= start) & (whole.context.places < stop)
        context = Context(whole.context.tokens[inside], whole.context.places[inside] - start)
        tokens = whole.tokens.reshape(1, -1)[:, start:stop]
        where = (slice(start, stop), slice(0, 1)) if edges else (slice(None), slice(number, number + 1))
        cuts = torch.tensor([0, stop - start]) if edges else whole.edges
        found.append((owner(teacher), Question(tokens, cuts, context), where))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_each_teacher_answers_its_own_samples_and_the_answers_are_put_together(packed):
    """Over random questions, with context, against the logits of each sample alone."""
    dice = random.Random(1 + packed)
    for trial in range(40):
        size = dice.choice([1, 2])
        whole = question(dice, packed, size, contexts=True)
        for rank in range(size):
            place = made.layout(context_rank=rank, context_size=size)
            sources = made.made(SAME, place)
            teachers = made.Alone(sources, place, made.settings(NAMES))
            assert teachers.request(whole) == 0
            answer = teachers.receive(0)
            (part,) = answer.parts
            expected, owners = (
                torch.empty(*whole.tokens.T.shape, made.VOCAB),
                torch.empty(whole.tokens.T.shape),
            )
            for teacher, single, where in alone(whole):
                expected[where] = sources[NAMES[teacher]].logits(single)
                owners[where] = teacher
            spans = context_rows(whole.tokens.shape[1], rank, size, whole.edges.tolist())
            here = torch.cat([torch.arange(span.start, span.stop) for span in spans])
            assert torch.equal(part.logits.logits, expected[here])
            assert torch.equal(answer.owners, owners[here].to(torch.int16)), trial
            asked = [source.asked for source in sources.values()]
            assert [bool(each) for each in asked] == [n in part.teachers for n in range(3)]
            assert sum(each.tokens.numel() for one in asked for each in one) == whole.tokens.numel()


def labelled(shape: torch.Size, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, made.PADDED, generator=generator)
    labels = torch.randint(made.VOCAB, shape, generator=generator)
    return logits, labels, (torch.rand(shape, generator=generator) < 0.8).float()


def as_probabilities(stats: DivergenceStats) -> tuple[Tensor, Tensor]:
    return stats.student_label_logprob.exp(), (-stats.teacher_entropy).exp()


LOSSES = [
    {"divergence": "forward_kl", "validity": "label", "ce_weight": 0.3},
    {"divergence": "jsd", "validity": "margin"},
    {"divergence": "reverse_kl", "validity": "confidence"},
    {"divergence": "skew_kl", "validity": as_probabilities},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("payloads", [SAME, *MIXED], ids=lambda each: "-".join(each.values()))
def test_every_token_gets_the_loss_and_the_gradient_that_it_gets_alone(payloads, packed):
    """Bit for bit, with steps and without, against the same payload; the float32 ones against the reference too."""
    dice = random.Random(5)
    for trial, options in enumerate(LOSSES):
        whole, place = question(dice, packed), made.layout()
        sources = made.made(payloads, place)
        teachers = made.Alone(sources, place, made.settings(NAMES))
        teachers.request(whole)
        answer = teachers.receive(0)
        shape = whole.tokens.T.shape
        logits, labels, mask = labelled(shape, trial)
        steps = None
        if trial % 2:
            # Steps of different samples have different numbers.
            steps = torch.zeros(shape, dtype=torch.int64)
            for number, (_, single, where) in enumerate(alone(whole)):
                length = single.tokens.shape[1]
                steps[where] = (100 * number + torch.arange(length) // 3)[:, None]
        student = logits.clone().requires_grad_()
        common = dict(options, vocab_size=made.VOCAB, skip_invalid_teacher=True)
        out = answer.loss(
            validity_calibrated_kl,
            student,
            labels,
            mask=mask,
            steps=steps,
            inplace_gradient="if_unused",
            **common,
        )
        upstream = torch.rand(shape, generator=torch.Generator().manual_seed(trial))
        (out.loss * upstream).sum().backward()
        for teacher, single, where in alone(whole):
            own = logits[where].clone().requires_grad_()
            expected = validity_calibrated_kl(
                own,
                sources[NAMES[teacher]].answer(single),
                labels[where],
                mask=mask[where],
                steps=None if steps is None else steps[where],
                **common,
            )
            (expected.loss * upstream[where]).sum().backward()
            exact = payloads[NAMES[teacher]] != "hidden"  # the loss makes its logits by a product
            for found, wanted in [
                *zip(out[:3], expected[:3], strict=True),
                *zip(out.stats, expected.stats, strict=True),
            ]:
                assert_equal(found[where], wanted, exact)
            assert_equal(student.grad[where], own.grad, exact)
            if (
                payloads[NAMES[teacher]] == "float32"
                and isinstance(options["validity"], str)
                and steps is None
            ):
                stats = reference.statistics(
                    logits[where].double(),
                    sources[NAMES[teacher]].logits(single),
                    labels[where],
                    name=options["divergence"],
                    vocab_size=made.VOCAB,
                    mask=mask[where],
                )
                weight, _ = reference.weights(
                    *reference.log_validities(stats, options["validity"]), sharpness=4.0, mask=mask[where]
                )
                truth = weight * stats["divergence"] + options.get("ce_weight", 0) * stats["cross_entropy"]
                torch.testing.assert_close(out.loss[where].double(), truth, atol=2e-5, rtol=2e-5)


def assert_equal(found: Tensor, expected: Tensor, exact: bool) -> None:
    if exact:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("upstream", ["look", "uneven"])
def test_the_fused_head_with_answers_in_several_forms(upstream):
    """Against logits made beforehand; teacher weights are expected by a head that relies on an even gradient."""
    dice = random.Random(3)
    for payloads in (SAME, *MIXED):
        whole, place = question(dice, False), made.layout()
        teachers = made.Alone(made.made(payloads, place), place, made.settings(NAMES))
        teachers.request(whole)
        answer = teachers.receive(0)
        found = [by_head(answer, whole.tokens.T.shape, None), by_head(answer, whole.tokens.T.shape, upstream)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def by_head(answer: Answer, shape: torch.Size, upstream: str | None) -> tuple[Tensor, ...]:
    """Loss, weight and gradients of a head; None: of one that makes all logits."""
    _, labels, mask = labelled(shape, 1)
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(*shape, 16, generator=generator).requires_grad_()
    layer = torch.randn(made.PADDED, 16, generator=generator).requires_grad_()
    weights, uneven = torch.tensor([1.0, 0.5, 3.0])[answer.owners.long()], torch.zeros(1)

    def calibrated(_: None, teacher: TeacherLogits, labels: Tensor, **arguments) -> CalibratedLoss:
        if upstream is None:
            return validity_calibrated_kl(states @ layer.T, teacher, labels, **arguments)
        head = {"upstream": upstream, "found_uneven": uneven}
        return fused_validity_calibrated_kl(states, layer, teacher, labels, **head, **arguments)

    out = answer.loss(calibrated, None, labels, mask=mask * weights, vocab_size=made.VOCAB)
    (out.loss * weights * mask).sum().backward()
    assert float(uneven) == 0
    return out.loss, out.weight, states.grad, layer.grad


def test_a_verifier_judges_each_token_once():
    place, judged = made.layout(), []
    teachers = made.Alone(made.made(MIXED[0], place), place, made.settings(NAMES))
    tokens = torch.arange(8).view(4, 2)
    teachers.request(Question(tokens, teachers=("math", "code", "math", "law")))
    answer = teachers.receive(0)
    logits, labels, mask = labelled(tokens.T.shape, 1)

    def judge(stats):
        judged.append(stats.student_action >= 0)
        half = torch.full(stats.divergence.shape, 0.5)
        return half, half

    answer.loss(validity_calibrated_kl, logits, labels, mask=mask, validity=judge, vocab_size=made.VOCAB)
    assert len(judged) == 2 and torch.equal(judged[0] ^ judged[1], torch.ones_like(mask, dtype=torch.bool))


def test_each_form_of_answer_has_its_judge():
    """Against each sample alone, with its own judge."""
    place, whole = (
        made.layout(),
        Question(torch.arange(8).view(4, 2), teachers=("math", "code", "math", "law")),
    )
    logits, labels, mask = labelled(whole.tokens.T.shape, 1)
    common = {"validity": "privileged", "vocab_size": made.VOCAB}
    for payloads in MIXED:
        sources = made.made(payloads, place)
        judges = {name: made.Made(10 + n, payloads[name], place) for n, name in enumerate(NAMES)}
        answers = []
        for each in (sources, judges):
            teachers = made.Alone(each, place, made.settings(NAMES))
            teachers.request(whole)
            answers.append(teachers.receive(0))
        answer, judge = answers
        assert len(answer.parts) > 1
        out = answer.loss(validity_calibrated_kl, logits, labels, mask=mask, judge=judge, **common)
        for teacher, single, where in alone(whole):
            name = NAMES[teacher]
            expected = validity_calibrated_kl(
                logits[where],
                sources[name].answer(single),
                labels[where],
                mask=mask[where],
                judge=judges[name].answer(single),
                **common,
            )
            for found, wanted in zip(out[:3], expected[:3], strict=True):
                assert_equal(found[where], wanted, payloads[name] != "hidden")


def test_one_teacher_is_asked_as_before():
    """Nothing is cut, copied or told where there is one teacher, or one in a micro-batch."""
    place = made.layout()
    whole = Question(torch.arange(6).view(2, 3))
    (source,) = made.made({"": "float32"}, place).values()
    source.receive = lambda number: source.answer(source.asked[number])
    one = made.Alone({"": source}, place, made.settings(("math",)))
    one.request(whole)
    assert source.asked[0].tokens is whole.tokens and one.receive(0).owners is None and not one._splits
    three = made.Alone(made.made(SAME, place), place, made.settings(NAMES))
    three.request(whole._replace(teachers=("code", 1)))
    assert three.sources["code"].asked[0].tokens is whole.tokens
    answer = three.receive(0)
    assert answer.teachers == (1,) and answer.owners.unique().tolist() == [1]
    assert not three.sources["math"].asked and not three.sources["law"].asked


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, ()),
        (torch.tensor([1, 0]), (1, 0)),
        (torch.tensor([[2], [0]]), (2, 0)),
        (["math", "code"], ("math", "code")),
        (("math", 1), ("math", 1)),
    ],
)
def test_the_field_names_a_teacher_for_each_row(given, found):
    assert (
        question_of({"tokens": torch.zeros(2, 4, dtype=torch.long), "vcrd_teacher": given}, "tokens").teachers
        == found
    )


@pytest.mark.parametrize(
    ("edges", "given", "found"),
    [
        ([[0, 3, 8]], torch.tensor([1, 2]), (1, 2)),
        (
            [[0, 3, 6]],
            ["code", "math"],
            ("code", "math", "math"),
        ),  # the padding goes with the sequence before it
        ([[0, 3, 6]], [1, 0, 2], (1, 0, 2)),  # or where it is sent
        ([[0, 3, 8, 8, -1]], torch.tensor([[1, 2, -1]]), (1, 2)),
        ([[0, 2, 4], [0, 3, -1]], torch.tensor([[1, 2], [0, -1]]), (1, 2, 0, 0)),
        ([[0, 2, 4], [0, 3, 4]], [["a", "b"], ["c", "d"]], ("a", "b", "c", "d")),
        ([[0], [0, 4]], [2], (0, 2)),
    ],
)
def test_the_field_names_a_teacher_for_each_packed_sequence(edges, given, found):
    width = max(len(row) for row in edges)
    cuts = torch.tensor([row + [-1] * (width - len(row)) for row in edges])
    tokens = torch.zeros(len(edges), 8 // len(edges), dtype=torch.long)
    batch = {"tokens": tokens, "cu_seqlens": cuts, "vcrd_teacher": given}
    assert question_of(batch, "tokens").teachers == found
    arguments = {"cu_seqlens": cuts, "input_ids": tokens}
    assert question_of({"tokens": tokens, "vcrd_teacher": given}, "tokens", arguments).teachers == found


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (torch.tensor([0]), "one for each of 2 rows, got 1"),
        (torch.tensor([0.0, 1.0]), "integers or names, got torch.float32"),
        (torch.tensor([True, False]), "integers or names, got torch.bool"),
        ("math", "a tensor of integers or a list of names, got str"),
        (["math", 0.5], "integers or names, got float"),
        (["math", "poetry"], r"names of teachers \(math, code, law\), got 'poetry'"),
        (torch.tensor([0, 3]), r"integers from 0 to 2 \(math, code, law\), got 3"),
        (torch.tensor([-1, 0]), r"integers from 0 to 2 \(math, code, law\), got -1"),
    ],
)
def test_a_wrong_field_is_one_sentence(given, why):
    with pytest.raises(ValueError, match=f"^vcrd_teacher: expected {why}$"):
        Split.of(
            question_of({"tokens": torch.zeros(2, 4, dtype=torch.long), "vcrd_teacher": given}, "tokens"),
            NAMES,
        )


@pytest.mark.parametrize("given", [torch.tensor([0, 1]), ["math", "math"]])
def test_a_field_where_no_teacher_has_a_name_is_one_sentence(given):
    asked = question_of({"tokens": torch.zeros(2, 4, dtype=torch.long), "vcrd_teacher": given}, "tokens")
    with pytest.raises(ValueError, match="^vcrd_teacher: expected 0 or none, because the settings name no"):
        Split.of(asked, ("",))
    assert Split.of(asked._replace(teachers=(0, 0)), ("",)).owners == (0, 0)


def test_packed_sequences_without_a_teacher_each_are_one_sentence():
    batch = {"tokens": torch.zeros(1, 8, dtype=torch.long), "cu_seqlens": torch.tensor([0, 3, 6])}
    with pytest.raises(
        ValueError, match="^vcrd_teacher: expected one for each of 2 packed sequences, got 1$"
    ):
        question_of({**batch, "vcrd_teacher": [0]}, "tokens")


def test_teachers_of_different_tokenizers_are_refused_although_the_student_states_none(caplog):
    place = made.layout()
    sources = made.made(SAME, place)
    sources["math"].tokenizer, sources["law"].tokenizer = Tokenizer("A", 45, "ab"), Tokenizer("B", 45, "cd")
    with pytest.raises(
        HandshakeRefused, match="for the teacher math and B of 45 .* for the teacher law, which give"
    ):
        made.Alone(sources, place, made.settings(NAMES))
    made.Alone(sources, place, replace(made.settings(NAMES), identity="warn"))
    assert "for the teacher law" in caplog.text


def test_figures_of_each_teacher_are_those_of_its_tokens():
    """Against the sums over each teacher's tokens, also of a teacher that has none."""
    place = made.layout()
    teachers = made.Alone(made.made(SAME, place), place, made.settings(NAMES))
    report, sums = Report(names=NAMES), torch.zeros(3, 3, dtype=torch.float64)
    for number, names in enumerate((("math", "law"), ("math", "math"))):
        tokens = torch.arange(8).view(2, 4) + number
        teachers.request(Question(tokens, teachers=names))
        answer = teachers.receive(number)
        logits, labels, mask = labelled(tokens.T.shape, number)
        out = answer.loss(validity_calibrated_kl, logits, labels, mask=mask, vocab_size=made.VOCAB)
        report.add(out, mask, answer.owners)
        for row, name in enumerate(names):
            keep = mask[:, row].bool()
            own = [keep.sum(), out.stats.divergence[:, row][keep].sum(), out.weight[:, row][keep].sum()]
            sums[NAMES.index(name)] += torch.stack([each.double() for each in own])
    report.add_link(0.25, 8, teacher=2)
    figures = report.take()
    assert [each.name for each in figures.teachers] == list(NAMES) and figures.teacher_wait == 0.25
    for each, (tokens, divergence, weight) in zip(figures.teachers, sums.tolist(), strict=True):
        assert each.tokens == tokens
        assert each.divergence == pytest.approx(divergence / max(tokens, 1), rel=1e-6)
        assert each.weight == pytest.approx(weight / max(tokens, 1), rel=1e-6)
    assert sum(each.tokens for each in figures.teachers) == figures.tokens
    assert [each.wait for each in figures.teachers] == [0, 0, 0.25]
    assert report.take().teachers[2].wait == 0


def shared_micro_batches(packed: bool, wrong: bool) -> list:
    """On each of 2 x 2 tensor- and context-parallel ranks: its answers. Only the first rank knows the questions."""
    from megatron.core import parallel_state

    from vcrd.megatron.layout import Groups

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2, context_parallel_size=2)
    groups = Groups.of(None)
    place = made.layout(
        groups.tensor.rank(), groups.tensor.size(), groups.context.rank(), groups.context.size(), groups
    )
    dice = random.Random(7)
    asked = [question(dice, packed, 2) for _ in range(8)]
    sources = made.made(SAME, place)
    link = replace(made.settings(NAMES), address="math=127.0.0.1:1,code=127.0.0.1:2,law=127.0.0.1:3")
    teachers = made.Teachers(sources, place, link)
    found: list = []
    try:
        if place.asks:
            for each in asked:
                teachers.request(each)
            if wrong:
                teachers.request(asked[0]._replace(teachers=("poetry",) * len(asked[0].teachers)))
        else:  # the answers arrive, but what they are to is not known
            for each in asked:
                split = Split.of(each, NAMES)
                for teacher in split.present:
                    sources[NAMES[teacher]].asked.append(split.question(each, teacher))
        for number in range(len(asked) + wrong):
            found.append(teachers.receive(number))
    except ValueError as error:
        found.append(str(error))
    teachers.close()
    return [place.context_rank, place.tensor_rank, found, asked]


@pytest.mark.parametrize("packed", [False, True])
def test_the_ranks_that_know_no_tokens_learn_which_teacher_has_which(packed):
    (ranks,) = run_worlds(World(shared_micro_batches, 4, arguments=(packed, packed)))
    for context_rank, tensor_rank, found, asked in ranks:
        place = made.layout(tensor_rank, 2, context_rank, 2)
        teachers = made.Alone(made.made(SAME, place), place, made.settings(NAMES))
        if packed:  # what the first rank refused, all of them refuse
            assert found[-1].startswith("vcrd_teacher: expected names of teachers (math, code, law)")
        if packed and place.asks:
            continue  # it raised before it took an answer
        for number, whole in enumerate(asked):
            teachers.request(whole)
            expected = teachers.receive(number)
            assert torch.equal(found[number].owners, expected.owners)
            assert torch.equal(found[number].parts[0].logits.logits, expected.parts[0].logits.logits)


def a_rank_that_leaves() -> str:
    from megatron.core import parallel_state

    from vcrd.megatron.layout import Groups

    groups = Groups.of(None)
    place = made.layout(groups.tensor.rank(), 2, groups=groups)
    link = replace(made.settings(NAMES), address="math=127.0.0.1:1,code=127.0.0.1:2,law=127.0.0.1:3")
    teachers = made.Teachers(made.made(SAME, place), place, link)
    assert parallel_state.model_parallel_is_initialized()
    if place.asks:
        teachers._channel.give_up("student data rank 0, tensor rank 0 cannot go on")
        teachers.close()
        return ""
    with pytest.raises(LinkError) as error:
        teachers.receive(0)
    teachers.close()
    return str(error.value)


def a_judge_without_a_context() -> str:
    from vcrd.megatron.layout import Groups

    groups = Groups.of(None)
    place = made.layout(groups.tensor.rank(), 2, groups=groups)
    link = replace(made.settings(NAMES), address="math=127.0.0.1:1,code=127.0.0.1:2,law=127.0.0.1:3")
    teachers = AskedTwice(made.made(SAME, place), place, link)
    try:
        if place.asks:
            teachers.request(Question(torch.zeros(1, 4, dtype=torch.int64)))
        else:
            teachers.receive(0)
    except ValueError as error:
        return str(error)
    finally:
        teachers.close()
    return ""


def test_a_micro_batch_without_a_context_for_the_judges_is_refused_on_every_rank():
    ((one, other),) = run_worlds(World(a_judge_without_a_context, 2, tensor=2))
    assert one == other and one.startswith(
        "vcrd_teacher_context: expected in every micro-batch with validity"
    )


def test_a_rank_that_cannot_go_on_ends_the_wait_of_the_others():
    ((_, said),) = run_worlds(World(a_rank_that_leaves, 2, tensor=2))
    assert "student data rank 0, tensor rank 0 cannot go on" in said


def test_a_part_of_no_token_is_not_asked_for():
    answer = Answer((Part(None, (0, 2)), Part(None, (1,))), torch.tensor([[0, 1], [2, 1]], dtype=torch.int16))
    assert answer.teachers == (0, 1, 2)
    assert answer.tokens_of(0, 2).tolist() == [[True, False], [True, False]]
    assert answer.tokens_of(1).tolist() == [[False, True], [False, True]]
    assert answer.tokens_of(0, 1, 2) is None
