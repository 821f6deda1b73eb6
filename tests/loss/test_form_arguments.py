"""The forms of teacher under wrong arguments, under torch.compile and under no_grad."""

from __future__ import annotations

import pytest
import torch
from cases import call
from forms import HiddenCase, MixedCase, TopKCase

import vcrd

STUDENT = torch.zeros(3, 8)
LABELS = torch.zeros(3, dtype=torch.long)
CASES = [
    TopKCase((6,), 130, with_mask=True, k=5),
    HiddenCase((6,), 130, with_mask=True),
    MixedCase((6,), 130, with_mask=True),
]


def topk(logprobs=None, ids=None, log_tail=None) -> vcrd.TopKLogits:
    return vcrd.TopKLogits(
        torch.full((3, 2), -1.0) if logprobs is None else logprobs,
        torch.tensor([[0, 1]] * 3) if ids is None else ids,
        torch.full((3,), -2.0) if log_tail is None else log_tail,
    )


def hidden(states=None, weight=None, *rest) -> vcrd.HiddenStates:
    return vcrd.HiddenStates(
        torch.zeros(3, 4) if states is None else states,
        torch.zeros(8, 4) if weight is None else weight,
        *rest,
    )


def dense(columns: int) -> vcrd.DenseLogits:
    return vcrd.DenseLogits(torch.zeros(3, columns))


def mixed(*teachers) -> vcrd.MixedLogits:
    return vcrd.MixedLogits(teachers, (1.0,) * len(teachers))


@pytest.mark.parametrize(
    ("error", "sentence", "teacher", "settings"),
    [
        (
            TypeError,
            "teacher_logits: expected a tensor, DenseLogits, .* or MixedLogits, got tuple",
            (1, 2),
            {},
        ),
        (TypeError, "teacher_logits.logprobs: expected a tensor, got list", topk([0.0]), {}),
        (
            TypeError,
            "teacher_logits.logprobs: expected float32, got torch.float64",
            topk(torch.zeros(3, 2).double()),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.logprobs: expected shape \[..., k\], got a scalar",
            topk(torch.tensor(0.0)),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.logprobs: expected the student's leading shape \[3\], got \[2\]",
            topk(torch.zeros(2, 2)),
            {},
        ),
        (
            ValueError,
            "teacher_logits.logprobs: expected at least one per token, got none",
            topk(torch.zeros(3, 0), torch.zeros(3, 0).long()),
            {},
        ),
        (
            TypeError,
            "teacher_logits.ids: expected a tensor, got NoneType",
            vcrd.TopKLogits(torch.zeros(3, 2), None, None),
            {},
        ),
        (
            TypeError,
            "teacher_logits.ids: expected integers, got torch.float32",
            topk(ids=torch.zeros(3, 2)),
            {},
        ),
        (
            TypeError,
            "teacher_logits.ids: expected integers, got torch.bool",
            topk(ids=torch.zeros(3, 2).bool()),
            {},
        ),
        (
            ValueError,
            "teacher_logits.ids: expected 2 per token, as logprobs, got 1",
            topk(ids=torch.zeros(3, 1).long()),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.ids: expected the student's leading shape \[3\], got \[3, 1\]",
            topk(ids=torch.zeros(3, 1, 2).long()),
            {},
        ),
        (
            TypeError,
            "teacher_logits.log_tail: expected float32, got torch.bfloat16",
            topk(log_tail=torch.zeros(3).bfloat16()),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.log_tail: expected the logits' leading shape \[3\], got \[3, 1\]",
            topk(log_tail=torch.zeros(3, 1)),
            {},
        ),
        (
            ValueError,
            "temperature: expected 1 with a teacher of TopKLogits, .* got 2.0",
            topk(),
            dict(temperature=2.0),
        ),
        (
            TypeError,
            "teacher_logits.states: expected a tensor, got NoneType",
            vcrd.HiddenStates(None, STUDENT),
            {},
        ),
        (
            TypeError,
            "teacher_logits.states: expected float32, bfloat16 or float16, got torch.float64",
            hidden(torch.zeros(3, 4).double()),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.states: expected the student's leading shape \[3\], got \[4\]",
            hidden(torch.zeros(4, 4)),
            {},
        ),
        (ValueError, "teacher_logits.states: expected shape .* got a scalar", hidden(torch.tensor(1.0)), {}),
        (TypeError, "teacher_logits.weight: expected a tensor, got list", hidden(weight=[1.0]), {}),
        (
            TypeError,
            "teacher_logits.weight: expected float32, bfloat16 or float16, got torch.uint8",
            hidden(weight=torch.zeros(8, 4).byte()),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.weight: expected shape \[vocabulary shard, 4\], got \[8, 5\]",
            hidden(weight=torch.zeros(8, 5)),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.weight: expected shape \[vocabulary shard, 4\], got \[32\]",
            hidden(weight=torch.zeros(32)),
            {},
        ),
        (
            ValueError,
            "teacher_logits.weight: expected at least 8 rows on rank 0, .* got 7",
            hidden(weight=torch.zeros(7, 4)),
            dict(vocab_size=8),
        ),
        (
            ValueError,
            "vocab_size: needed where student and teacher are padded differently",
            hidden(weight=torch.zeros(9, 4)),
            {},
        ),
        (TypeError, "teacher_logits.scale: expected a number, got str", hidden(None, None, "1"), {}),
        (TypeError, "teacher_logits.scale: expected a number, got NoneType", hidden(None, None, None), {}),
        (
            ValueError,
            "teacher_logits.scale: expected a finite number above 0, got 0",
            hidden(None, None, 0),
            {},
        ),
        (
            TypeError,
            "teacher_logits.softcap: expected a number or None, got bool",
            hidden(None, None, 1.0, True),
            {},
        ),
        (
            ValueError,
            "teacher_logits.softcap: expected a finite number above 0 or None, got inf",
            hidden(None, None, 1.0, float("inf")),
            {},
        ),
        (
            ValueError,
            "teacher_logits.weight: expected device cpu of student_logits, got meta",
            hidden(weight=torch.zeros(8, 4, device="meta")),
            {},
        ),
        (
            ValueError,
            "teacher_logits.ids: expected device cpu of student_logits, got meta",
            topk(ids=torch.zeros(3, 2, dtype=torch.long, device="meta")),
            {},
        ),
        (ValueError, "teacher_logits.teachers: expected at least one teacher, got none", mixed(), {}),
        (
            TypeError,
            r"teacher_logits.teachers\[1\]: expected DenseLogits or .*, got TopK",
            mixed(dense(8), topk()),
            {},
        ),
        (
            ValueError,
            "teacher_logits.weights: expected 2, one for each teacher, got 1",
            vcrd.MixedLogits((dense(8), hidden()), (1.0,)),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.weights\[0\]: expected a finite number above 0, got 0",
            vcrd.MixedLogits((dense(8),), (0,)),
            {},
        ),
        (
            ValueError,
            r"teacher_logits.teachers\[1\]: expected at least 8 columns on rank 0, .* got 7",
            mixed(hidden(), dense(7)),
            dict(vocab_size=8),
        ),
        (
            ValueError,
            r"teacher_logits.teachers\[0\].weight: expected shape \[vocabulary shard, 4\], got \[8, 5\]",
            mixed(hidden(weight=torch.zeros(8, 5))),
            {},
        ),
    ],
)
def test_one_sentence_names_the_argument(error, sentence, teacher, settings):
    with pytest.raises(error, match=sentence) as caught:
        vcrd.validity_calibrated_kl(STUDENT, teacher, LABELS, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case).__name__)
def test_compiled_equals_eager_at_the_price_of_a_graph_break(device, case):
    def loss(student, teacher, labels, mask):
        out = vcrd.validity_calibrated_kl(
            student * 1.5, teacher, labels, mask=mask, divergence="jsd", ce_weight=0.1, inplace_gradient=True
        )
        return out.loss.sum() + 0 * out.weight.sum()

    student, teacher, labels, mask = case.tensors(device)
    a, b = student.nan_to_num().requires_grad_(), student.nan_to_num().requires_grad_()
    eager = loss(a, teacher, labels, mask)
    graph = torch.compile(loss, backend="aot_eager")(b, teacher, labels, mask)
    torch.testing.assert_close(graph, eager)
    eager.backward()
    graph.backward()
    torch.testing.assert_close(b.grad, a.grad)
    torch._dynamo.reset()  # the function's code is known by now, graph break and all
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(b, teacher, labels, mask)


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case).__name__)
def test_no_grad_gives_the_same_numbers_and_no_graph(device, case):
    student, teacher, labels, mask = case.tensors(device)
    expected = call(case, student.clone().requires_grad_(), teacher, labels, mask)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = call(case, student, teacher, labels, mask)
        assert not stats.divergence.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case).__name__)
def test_only_the_requested_gradient_is_computed_and_twice_is_the_same(device, case):
    for name in ("divergence", "cross_entropy"):
        student, teacher, labels, mask = case.tensors(device)
        student.requires_grad_()
        total = getattr(call(case, student, teacher, labels, mask, _block_bytes=1), name).sum()
        first = torch.autograd.grad(total, student, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(total, student)[0])
        exact, teacher, labels, mask = case.tensors()
        exact = exact.double().requires_grad_()
        case.statistics(exact, teacher, labels, mask)[name].sum().backward()
        torch.testing.assert_close(first.cpu().double(), exact.grad, rtol=1e-4, atol=1e-6)
