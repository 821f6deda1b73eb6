"""The extension vcrd._C: whether it loads, was built for this torch and these GPUs, and computes the right values.

The kernels are compared with `vcrd.loss.reference`, in float64.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vcrd
from vcrd import build_record
from vcrd.doctor.checks import Job, import_crash
from vcrd.doctor.findings import Finding, first_line, ok, problem, unchecked
from vcrd.doctor.packages import ARCHITECTURE, runs_on
from vcrd.loss import reference

_BUILD = "Build it with `pip install --no-build-isolation .` in the checkout"
_TOKENS, _VOCAB, _HIDDEN, _K = 7, 1031, 32, 8  # 1031 is no multiple of a vector or block width
_TOLERANCE = 1e-4  # relative to the largest value; float32 reaches 1e-5, a wrong kernel errs far more
_ROUNDING = {
    torch.float32: 0.0,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}  # relative rounding error of the gradient
_FORMS = ("logits", "logits_8bit", "topk", "hidden")


def extension(job: Job) -> list[Finding]:
    """Whether vcrd._C loads, and for which torch and GPUs it was built."""
    if crash := import_crash("vcrd.loss.ops", job.options.timeout / 2):
        text = f"importing it {crash}: its file is damaged, or was built for another machine"
        return [problem("extension", text, f"{_BUILD} on this machine.")]
    try:
        built = importlib.import_module("vcrd.loss.ops")._C
    except ImportError as error:
        return [_import_problem(error)]
    found = []
    if built.torch_version != torch.__version__:
        text = f"built with torch {built.torch_version}, but this is {torch.__version__}"
        found.append(problem("extension", text, f"{_BUILD}, with this torch."))
    else:
        compiled = "CPU and CUDA kernels" if built.with_cuda else "CPU kernels only"
        threads = "" if built.threaded else ", one thread"
        text = f"built with this torch; {compiled}, CPU instructions {built.cpu_instruction_set}{threads}"
        found.append(ok("extension", text))
    return [*found, _architectures(built)]


def _import_problem(error: ImportError) -> Finding:
    cause = str(error.__cause__ or error)
    if refusal := build_record.refusal(build_record.read(), torch.__version__, torch.version.cuda):
        text = refusal.partition(": ")[0].removeprefix("vcrd's extension was ")
    elif "undefined symbol" in cause or "symbol not found" in cause:
        text = f"it was not built with this torch, {torch.__version__} (undefined symbol)"
    elif "cannot import name '_C'" in cause or "No module named 'vcrd._C'" in cause:
        folder = Path(vcrd.__file__).parent
        others = sorted(path.name for path in folder.glob("_C*.so"))
        text = "it is not built"
        if others:
            text = f"it is built for another Python ({', '.join(others)}), but this is {platform.python_version()}"
    else:
        text = f"it cannot be loaded: {first_line(error.__cause__ or error)}"
    return problem("extension", text, f"{_BUILD}, with this Python and this torch ({torch.__version__}).")


def _architectures(built: object) -> Finding:
    listed = getattr(built, "cuda_architectures", "")  # older builds do not have it
    if not torch.cuda.is_available():
        text = f"the extension is built for {listed}; no GPU here to compare" if listed else "no GPU here"
        return unchecked("architectures", text)
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    fix = f"{_BUILD} on this node, or with TORCH_CUDA_ARCH_LIST={names.replace(', ', ';')}."
    if not built.with_cuda:
        return problem("architectures", "the extension has no CUDA kernels, but there is a GPU", fix)
    if not all(map(ARCHITECTURE.fullmatch, listed.split(";"))):  # "Hopper" for example
        text = f"the extension does not list its architectures as numbers, but as {listed or 'nothing'}"
        return unchecked("architectures", text)
    if not all(runs_on(listed.split(";"), capability) for capability in capabilities):
        return problem(
            "architectures", f"the extension is built for {listed}, the GPUs here have {names}", fix
        )
    return ok("architectures", f"the extension is built for {listed}, the GPUs here have {names}")


@dataclass(frozen=True)
class _Case:
    divergence: str
    dtype: torch.dtype
    form: str

    def __str__(self) -> str:
        return f"{self.divergence}, {str(self.dtype).removeprefix('torch.')}, teacher as {self.form}"


def kernels(job: Job) -> list[Finding]:
    """Tests the kernels on the CPU once per node, and on the GPU of this process. A single process tests every GPU. No
    collectives.
    """
    if not _can_import(job):
        return [unchecked("kernels", "the extension cannot be loaded, see its line")]
    found = [_test_on(torch.device("cpu"))] if job.first_on_node else []
    if not torch.cuda.is_available():
        return [*found, unchecked("cuda kernels", "no GPU here, so only the CPU kernels were tested")]
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vcrd::row_statistics", "CUDA"):
        return [*found, unchecked("cuda kernels", "the extension has none, see the line `architectures`")]
    if job.options.during_run:
        return [*found, unchecked("cuda kernels", "a run is using the GPUs")]
    count = torch.cuda.device_count()
    mine = range(count) if job.world.size == 1 else [job.world.local_rank % count]
    results = [_test_on(torch.device("cuda", index)) for index in mine]
    wrong = [result for result in results if result.fix]
    return [*found, *(wrong or results[:1])]


def _can_import(job: Job) -> bool:
    if import_crash("vcrd.loss.ops", job.options.timeout / 2):
        return False
    try:
        importlib.import_module("vcrd.loss.ops")
    except ImportError:
        return False
    return True


def _test_on(device: torch.device) -> Finding:
    name = "kernels" if device.type == "cpu" else "cuda kernels"
    worst, count = 0.0, 0
    for case in _cases():
        try:
            error = _error(case, device)
        except Exception as failed:  # for example a kernel that was not built for this GPU
            return _failed(device, f"{case} fails on {device}: {first_line(failed)}")
        if not error <= 1:
            return _failed(device, f"{case} is wrong on {device}: {error:.3g} times the allowed error")
        worst, count = max(worst, error), count + 1
    text = f"{count} losses and gradients agree with the float64 reference"
    return ok(name, f"{text} (error at most {worst:.2g} of the allowed error)")


def _failed(device: torch.device, text: str) -> Finding:
    fix = (
        "Rebuild the extension on this node with `pip install --no-build-isolation .`. If that does not help, take the "
        "node out of the job."
    )
    if device.type == "cpu":
        return problem("kernels", text, fix)
    return problem("cuda kernels", text, fix)


def _cases() -> Iterator[_Case]:
    from vcrd.loss.config import DIVERGENCES

    dtypes = list(_ROUNDING)
    for number, divergence in enumerate(DIVERGENCES):
        for form in _FORMS:
            yield _Case(divergence, dtypes[(number + _FORMS.index(form)) % len(dtypes)], form)
        yield _Case(divergence, dtypes[(number + 1) % len(dtypes)], "logits")


def _error(case: _Case, device: torch.device) -> float:
    """The largest error of loss and gradient, in units of the allowed error."""
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
    """The teacher's argument of the loss, and the same for the reference."""
    from vcrd.teacher_logits import HiddenStates, TopKLogits

    logits = normal(_TOKENS, _VOCAB)
    if case.form == "logits":
        logits = logits.to(case.dtype)
        return logits.to(device), [logits]
    if case.form == "logits_8bit":
        maxima, codes = logits.amax(-1), torch.empty(logits.shape, dtype=torch.uint8, device=device)
        torch.ops.vcrd.encode(logits.to(device), maxima.to(device), codes)
        # A code may be rounded either way. The reference uses the codes that the kernel made.
        wanted = 255 * ((maxima[:, None] - logits).double().clamp(max=24) / 24).sqrt()
        if not (codes.cpu().double() - wanted).abs().max() < 0.51:
            raise ArithmeticError("the 8-bit codes do not match the logits")
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


CHECKS = (extension, kernels)
