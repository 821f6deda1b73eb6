"""Checks the kernels on this machine: the loss and its gradient against `vcrd.loss.reference`, which is in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vcrd.doctor import loading
from vcrd.doctor.findings import Finding, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job
from vcrd.loss import reference

_TOKENS, _VOCAB, _HIDDEN, _K = 7, 1031, 32, 8  # 1031: of no vector's and no block's width a multiple
_TOLERANCE = 1e-4  # of the largest value; float32 does 1e-5, a wrong kernel nothing like it
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the gradient, once
_FORMS = ("logits", "logits_8bit", "topk", "hidden")


@dataclass(frozen=True)
class _Case:
    divergence: str
    dtype: torch.dtype
    form: str

    def __str__(self) -> str:
        return f"{self.divergence}, {str(self.dtype).removeprefix('torch.')}, teacher as {self.form}"


def check(job: Job) -> list[Finding]:
    """On the CPU once a node, and on this process's GPU, or on every GPU where it is alone. No collectives."""
    try:
        loadable = not loading.cannot_bear("vcrd.loss.ops", job.patience / 2) and importlib.import_module(
            "vcrd.loss.ops"
        )
    except ImportError:
        loadable = False
    if not loadable:
        return [unchecked("kernels", "the extension does not load, see its line")]
    found = [_on(torch.device("cpu"))] if job.first_on_node else []
    if not torch.cuda.is_available():
        return [*found, unchecked("cuda kernels", "no GPU here, so only the CPU's were tested")]
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vcrd::row_statistics", "CUDA"):
        return [*found, unchecked("cuda kernels", "the extension has none, see the line `architectures`")]
    if job.during_run:
        return [*found, unchecked("cuda kernels", "a run has the GPUs")]
    count = torch.cuda.device_count()
    mine = range(count) if job.world.size == 1 else [job.world.local_rank % count]
    results = [_on(torch.device("cuda", index)) for index in mine]
    wrong = [result for result in results if result.fix]
    return [*found, *(wrong or results[:1])]


def _on(device: torch.device) -> Finding:
    name = "kernels" if device.type == "cpu" else "cuda kernels"
    worst, count = 0.0, 0
    for case in _cases():
        try:
            error = _error(case, device)
        except Exception as failed:  # a kernel that cannot be launched, or does not exist for this GPU
            return _failed(device, f"{case} fails on {device}: {first_line(failed)}")
        if not error <= 1:
            return _failed(
                device, f"{case} is wrong on {device}: {error:.3g} times the error that is allowed"
            )
        worst, count = max(worst, error), count + 1
    text = f"{count} losses and gradients agree with the float64 reference"
    return ok(name, f"{text} (error at most {worst:.2g} of what is allowed)")


def _failed(device: torch.device, text: str) -> Finding:
    fix = (
        "Build the extension anew on this node with `pip install --no-build-isolation .`, and if the line stays, take "
        "the node out of the job."
    )
    if device.type == "cpu":
        return fault("kernels", text, fix)
    return fault("cuda kernels", text, fix)


def _cases() -> Iterator[_Case]:
    from vcrd.loss.checks import DIVERGENCES

    dtypes = list(_ROUNDING)
    for number, divergence in enumerate(DIVERGENCES):
        for form in _FORMS:
            yield _Case(divergence, dtypes[(number + _FORMS.index(form)) % len(dtypes)], form)
        yield _Case(divergence, dtypes[(number + 1) % len(dtypes)], "logits")


def _error(case: _Case, device: torch.device) -> float:
    """The largest error of loss and gradient, in units of what is allowed."""
    import vcrd

    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 3

    student = normal(_TOKENS, _VOCAB).to(case.dtype)
    labels = torch.randint(_VOCAB, (_TOKENS,), generator=generator)
    upstream = torch.rand(_TOKENS, generator=generator)
    given, exact = _teacher(case, normal, device)

    on_device = student.to(device, copy=True).requires_grad_()
    out = vcrd.validity_calibrated_kl(on_device, given, labels.to(device), divergence=case.divergence)
    (out.loss * upstream.to(device)).sum().backward()

    truth = student.double().requires_grad_()
    function = reference.topk_statistics if case.form == "topk" else reference.statistics
    stats = function(truth, *exact, labels, name=case.divergence)
    weight, _ = reference.weights(*reference.log_validities(stats, "label"))
    loss = weight * stats["divergence"]
    (loss * upstream).sum().backward()
    return max(
        _relative(out.loss.detach(), loss.detach()) / _TOLERANCE,
        _relative(on_device.grad, truth.grad) / (_TOLERANCE + _ROUNDING[case.dtype]),
    )


def _teacher(case: _Case, normal, device: torch.device):
    """What the loss is given, and the same for the reference."""
    from vcrd.teacher_logits import HiddenStates, TopKLogits

    logits = normal(_TOKENS, _VOCAB)
    if case.form == "logits":
        logits = logits.to(case.dtype)
        return logits.to(device), [logits]
    if case.form == "logits_8bit":
        maxima, codes = logits.amax(-1), torch.empty(logits.shape, dtype=torch.uint8, device=device)
        torch.ops.vcrd.encode(logits.to(device), maxima.to(device), codes)
        # A rounding may fall either way; the codes that are there are the loss's to read.
        wanted = 255 * ((maxima[:, None] - logits).double().clamp(max=24) / 24).sqrt()
        if not (codes.cpu().double() - wanted).abs().max() < 0.51:
            raise ArithmeticError("the 8-bit codes are not those of the logits")
        return codes, [-24 * (codes.cpu().double() / 255) ** 2]
    if case.form == "topk":
        log_p = logits.double().log_softmax(-1)
        logprobs, ids = log_p.topk(_K, -1)
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        parts = logprobs.float(), ids, tail.float()
        return TopKLogits(*(part.to(device) for part in parts)), list(parts)
    states, weight = normal(_TOKENS, _HIDDEN), normal(_VOCAB, _HIDDEN) / _HIDDEN**0.5
    states, weight = states.to(case.dtype), weight.to(case.dtype)
    exact = states.double() @ weight.double().T
    return HiddenStates(states.to(device), weight.to(device)), [exact]


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual = actual.cpu().double()
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=0.02))
