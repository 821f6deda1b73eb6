"""The jobs that benchmarks/loss.py measures on one GPU. Each builds a function from logits to a loss, or says why not.

All get the same tensors: student and teacher logits [tokens, columns], labels [tokens]. All compute the same loss,
except Megatron's cross-entropy. It reads one tensor and hard labels, which is cheaper, and shows the cost of training
without distillation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import vcrd
from loss_methods import Method, compiled, modelopt
from vcrd.loss import reference


@dataclass(frozen=True)
class Job:
    """One loss. `truth` names the loss with the right gradient, `jsd` with its beta if that is not 1/2, summed over
    tokens (`mean`: divided by their number). `beside` names the jobs of vcrd that do the same; none for vcrd's own."""

    name: str
    build: Callable[[], Method | str]
    truth: str
    beside: tuple[str, ...] = ()
    mean: bool = False
    compiles: bool = False  # separately for every shape
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")


def divergence(name: str, inplace: bool, **settings: float) -> Method:
    def per_token(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return vcrd.vocab_parallel_divergence(
            student, teacher, divergence=name, inplace_gradient=inplace, **settings
        ).divergence

    return per_token


def calibrated() -> Method:
    def per_token(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return vcrd.validity_calibrated_kl(student, teacher, labels, inplace_gradient=True).loss

    return per_token


def liger(jsd: bool) -> Method | str:
    """Liger's losses need log-probabilities, so their time includes a log_softmax in float32."""
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # lists the backends that are not installed
    try:
        if jsd:
            from liger_kernel.transformers.jsd import LigerJSD

            criterion = LigerJSD(beta=0.5)  # divides by the number of tokens
        else:
            from liger_kernel.transformers.kl_div import LigerKLDIVLoss

            criterion = LigerKLDIVLoss(reduction="sum", log_target=True)
    except ImportError as error:
        return _absent("liger-kernel", "liger_kernel", error)

    def summed(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = student.log_softmax(-1, dtype=torch.float32)
        return criterion(log_q, teacher.log_softmax(-1, dtype=torch.float32))

    return summed


def megatron_cross_entropy() -> Method | str:
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    except ImportError as error:
        return _absent("megatron-core", "megatron", error)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def per_token(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return fused_vocab_parallel_cross_entropy(student.unsqueeze(1), labels.unsqueeze(1), dist.group.WORLD)

    return per_token


def _absent(package: str, module: str, error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module:
        return f"{package} is not installed"
    return f"{package} cannot be imported: {error}"


def _modelopt() -> Method | str:
    method = modelopt(1)
    return (
        "nvidia-modelopt is not installed" if isinstance(method, str) and "'modelopt'" in method else method
    )


KL, INPLACE, JSD, CALIBRATED = "vcrd", "vcrd in place", "vcrd jsd", "vcrd calibrated"
MODELOPT = "ModelOpt"
JOBS = (
    Job(KL, lambda: divergence("forward_kl", False), "forward_kl"),
    Job(INPLACE, lambda: divergence("forward_kl", True), "forward_kl"),
    Job(CALIBRATED, calibrated, "calibrated"),
    Job(JSD, lambda: divergence("jsd", False), "jsd"),
    # A beta other than 1/2 uses the general kernel, as all other mixtures do.
    Job("vcrd jsd, 0.4", lambda: divergence("jsd", False, beta=0.4), "jsd 0.4"),
    Job(MODELOPT, _modelopt, "forward_kl", (KL, INPLACE)),
    Job("compiled KL", compiled, "forward_kl", (KL, INPLACE), compiles=True),
    Job("Liger KL", lambda: liger(False), "forward_kl", (KL, INPLACE)),
    Job("Liger JSD", lambda: liger(True), "jsd", (JSD,), mean=True),
    # Its gradient is rounded to bfloat16 for every dtype of the logits.
    Job(
        "Megatron CE",
        megatron_cross_entropy,
        "cross_entropy",
        (KL, INPLACE),
        compiles=True,
        dtypes=("bfloat16",),
    ),
)


def true_gradient(truth: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The float64 gradient of the summed loss for the student's logits [rows, columns]; on CPU."""
    student = student.double().requires_grad_()
    name, _, beta = truth.partition(" ")
    name = name if name in ("jsd", "forward_kl") else "forward_kl"
    stats = reference.statistics(student, teacher, labels, name=name, beta=float(beta or 0.5))
    per_token = stats["cross_entropy" if truth == "cross_entropy" else "divergence"]
    if truth == "calibrated":
        weight, _ = reference.weights(*reference.log_validities(stats, "label"))
        per_token = weight * per_token
    return torch.autograd.grad(per_token.sum(), student)[0]
