"""The losses that benchmarks/loss.py compares. Each is a function from logits to per-token losses.

All get the same tensors: student and teacher logits [tokens, vocab / tp], labels [tokens].
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

import vcrd
from vcrd.loss import reference

Method = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS, OURS_INPLACE, MODELOPT, COMPILED = "vcrd", "in place", "ModelOpt", "compile"
METHODS = (OURS, OURS_INPLACE, MODELOPT, COMPILED)


def build(name: str, loss: str, tp: int) -> Method | str:
    """The method, or the reason why it cannot run on this machine."""
    if name in (OURS, OURS_INPLACE):
        return ours(loss, dist.group.WORLD if tp > 1 else None, name == OURS_INPLACE)
    if name == MODELOPT:
        return modelopt(tp)
    if tp > 1:
        return "a compiled KL has no vocabulary-parallel form"
    return compiled()


def ours(loss: str, group: dist.ProcessGroup | None, inplace: bool) -> Method:
    def calibrated(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return vcrd.validity_calibrated_kl(
            student, teacher, labels, group=group, inplace_gradient=inplace
        ).loss

    def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return vcrd.vocab_parallel_divergence(
            student, teacher, group=group, inplace_gradient=inplace
        ).divergence

    return calibrated if loss == "calibrated" else plain


def modelopt(tp: int) -> Method | str:
    """NVIDIA ModelOpt's LogitsKLLoss: KL(teacher || student), the peer for Megatron models."""
    for talker in ("modelopt", "torch.utils.cpp_extension"):  # they log inside the table that there is no GPU
        logging.getLogger(talker).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing packages for GPUs
            from megatron.core import parallel_state
            from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
    except ImportError as error:
        return f"nvidia-modelopt cannot be imported: {error}"
    if tp > 1:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    # The fields of a Megatron configuration that it reads.
    criterion = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=False))

    def per_token(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss, _tp_reduce, _sequence_parallel = criterion(student.unsqueeze(1), teacher.unsqueeze(1))
        return loss

    return per_token


def compiled() -> Method:
    """The textbook formula in float32, fused by torch.compile."""

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    fused = torch.compile(kl, fullgraph=True, dynamic=False)
    return lambda student, teacher, labels: fused(student, teacher)


def true_gradient(name: str, loss: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The float64 gradient of the summed loss for logits over the whole vocabulary [rows, vocab]."""
    student = student.double().requires_grad_()
    stats = reference.statistics(student, teacher, labels)
    per_token = stats["divergence"]
    if loss == "calibrated" and name in (OURS, OURS_INPLACE):
        weight, _ = reference.weights(*reference.log_validities(stats, "label"))
        per_token = weight * per_token
    return torch.autograd.grad(per_token.sum(), student)[0]
