"""The fused head against the float64 reference: on one rank, over shards, and what it does with memory and masks."""

from __future__ import annotations

import head_jobs as jobs
import pytest
import torch
from head_jobs import HeadCase, check, close
from sharded_jobs import spawn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vcrd
from vcrd.loss.fused_head import LayerProducts, common_multiple

pytestmark = pytest.mark.cpu_kernels


@pytest.mark.parametrize("case", jobs.cases(), ids=lambda c: f"{c.divergence}-{c.teacher}-{c.seed}")
def test_values_and_gradients_match_the_reference(case):
    check(case)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_match_the_reference(size, tmp_path):
    spawn(jobs.everything, size, tmp_path, torch.device("cpu"))


def test_collectives_are_those_of_the_docstring(tmp_path):
    spawn(jobs.count_collectives, 2, tmp_path, torch.device("cpu"))


def test_what_one_rank_gets_wrong_is_one_sentence_on_every_rank(tmp_path):
    spawn(jobs.raises_everywhere, 2, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("upstream", "products"),
    [("mean", 1), ("mean by a fractional mask", 1), ("each its own", 2), ("statistics too", 2)],
)
def test_logits_are_made_again_only_where_the_upstream_gradient_is_not_one_factor(
    upstream, products, monkeypatch
):
    made, plain = [], LayerProducts.logits
    monkeypatch.setattr(LayerProducts, "logits", lambda *a: made.append(len(a[1])) or plain(*a))
    case = HeadCase(
        masked=True,
        fractional="fractional" in upstream,
        uneven=upstream == "each its own",
        and_stats=upstream == "statistics too",
        seed=3,
    )
    check(case)
    assert sum(made) == products * int((case.tensors()["mask"] != 0).sum()), "masked tokens are not computed"


def test_a_second_backward_gives_the_same_gradients():
    tensors = HeadCase().tensors()
    weight = tensors["weight"].nan_to_num().requires_grad_()
    hidden = tensors["hidden"].requires_grad_()
    out = vcrd.fused_validity_calibrated_kl(hidden, weight, tensors["logits"], tensors["labels"])
    first = torch.autograd.grad(out.loss.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(out.loss.sum(), (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_and_no_grad_are_no_gradients():
    tensors = HeadCase().tensors()
    weight, hidden = tensors["weight"].nan_to_num(), tensors["hidden"].requires_grad_()
    given = (tensors["logits"], tensors["labels"])
    out = vcrd.fused_validity_calibrated_kl(hidden, weight, *given)
    out.loss.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None
    with torch.no_grad():
        quiet = vcrd.fused_validity_calibrated_kl(hidden, weight, *given)
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss)


def test_a_fractional_mask_is_what_the_upstream_gradient_is_expected_to_be():
    mask = torch.tensor([0.0, 0.25, 1.0, 0.5])

    def of(*given) -> tuple[float, bool]:
        multiple, uneven = common_multiple(*given)
        return float(multiple), bool(uneven)

    assert of(3 * mask, mask, mask) == (3, False)
    assert of(3 * mask.sqrt(), mask, mask)[1]
    assert of(torch.tensor([3e38, -3e38]), None, None)[1]
    assert of(torch.zeros(0), None, None) == of(mask, mask, torch.zeros(4)) == (1, False)
    # Not a number is not uneven: the gradient is no number either, and nobody broke a promise.
    for unlimited in ([torch.nan, 1.0], [torch.inf, torch.inf], [torch.inf, 1.0]):
        multiple, uneven = common_multiple(torch.tensor(unlimited), None, None)
        assert not multiple.isfinite() and not uneven


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device: the values of tensors that Python reads."""

    readers = frozenset(
        getattr(torch.Tensor, name)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
    ) | {torch.Tensor.nonzero, torch.nonzero, torch.equal, torch.Tensor.equal, torch.Tensor.__contains__}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.readers:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class DispatchedWaits(TorchDispatchMode):
    """The same, of the operators that C++ code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("and_main_grad", [False, True])
@pytest.mark.parametrize("normalization", ["none", "mean", "mass"])
@pytest.mark.parametrize(
    ("promised", "uneven", "products"),
    [(False, False, 1), (False, True, 2), (True, False, 1), (True, True, 1)],
)
def test_backward_waits_for_nothing_where_an_even_gradient_is_promised(
    promised, uneven, products, normalization, and_main_grad, monkeypatch
):
    made, plain = [], LayerProducts.logits
    monkeypatch.setattr(LayerProducts, "logits", lambda *a: made.append(len(a[1])) or plain(*a))
    case = HeadCase(masked=True, uneven=uneven, normalization=normalization, seed=3)
    tensors, found = case.tensors(), torch.zeros(1)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    if and_main_grad:
        weight.main_grad = torch.zeros_like(weight)
    out = vcrd.fused_validity_calibrated_kl(
        *(hidden, weight, case.form(tensors, slice(None)), tensors["labels"]),
        **case.arguments(tensors),
        upstream="even" if promised else "look",
        found_uneven=found,
        accumulate_main_grad=and_main_grad,
    )
    total = case.total(out.loss, None, None, tensors)
    with Waits() as waits, DispatchedWaits() as dispatched:
        total.backward()
    seen = waits.seen + dispatched.seen
    assert bool(seen) != promised, seen
    assert found == uneven and sum(made) == products * int(tensors["mask"].sum())
    *_, of_hidden, of_weight = case.truth()
    close(hidden.grad, of_hidden, 1e-5, "hidden states")
    gradient = weight.main_grad if and_main_grad else weight.grad
    if promised and uneven:
        assert gradient[: case.vocab].isnan().all(), "never a wrong gradient of the weight"
    else:
        close(gradient[: case.vocab], of_weight, 1e-5, "weight")


def test_what_is_found_uneven_needs_a_place():
    tensors = HeadCase().tensors()
    given = (tensors["hidden"], tensors["weight"], tensors["logits"])
    for place, sentence in (
        (torch.zeros(2), r"found_uneven: expected one float32, got \[2\] torch.float32"),
        (torch.zeros(1, dtype=torch.int64), "found_uneven: expected one float32, got .* torch.int64"),
        (0.0, "found_uneven: expected a tensor or None, got float"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            vcrd.fused_validity_calibrated_kl(*given, validity="margin", found_uneven=place)


@pytest.mark.parametrize("upstream", ["look", "uneven"])
def test_rows_of_a_bad_teacher_are_skipped_as_with_stored_logits(upstream):
    tensors = HeadCase().tensors()
    teacher = tensors["logits"].clone()
    teacher[1, 2, 5] = torch.nan
    results = []
    for fused in (False, True):
        hidden = tensors["hidden"].clone().requires_grad_()
        weight = tensors["weight"].nan_to_num().requires_grad_()
        options = {"skip_invalid_teacher": True, "normalization": "mean"}
        if fused:
            out = vcrd.fused_validity_calibrated_kl(
                *(hidden, weight, teacher, tensors["labels"]), upstream=upstream, **options
            )
        else:
            out = vcrd.validity_calibrated_kl(hidden @ weight.T, teacher, tensors["labels"], **options)
        out.loss.sum().backward()
        results.append((out.loss.detach(), out.weight, hidden.grad, weight.grad))
    assert results[1][0][1, 2] == 0
    for stored, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, stored, rtol=1e-5, atol=1e-6)
