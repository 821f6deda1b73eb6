"""What each rank runs in test_context_split.py: the loss of its context-parallel part of each row."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cases import Case
from sharded_jobs import shard
from torch import Tensor

import vcrd
from vcrd.link.plan import context_rows
from vcrd.loss import reference

ROWS, SEQUENCE, VOCAB = 2, 24, 64
# Steps of every length, the longest over half of a row, and of one row each; -1 between them.
STEPS = torch.tensor([[0] * 12 + [1] * 5 + [-1] + [2] * 6, [3] * 2 + [-1] * 3 + [4] * 11 + [5] * 8])


def parts(rank: int, tensor: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup, int, int]:
    """Megatron's order of ranks, tensor fastest: tensor and context group, and this rank's place in both."""
    context = dist.get_world_size() // tensor
    tensors = [dist.new_group(list(range(c * tensor, (c + 1) * tensor))) for c in range(context)]
    contexts = [dist.new_group(list(range(t, t + context * tensor, tensor))) for t in range(tensor)]
    return tensors[rank // tensor], contexts[rank % tensor], rank % tensor, rank // tensor


def split(rank: int, device: torch.device) -> None:
    """Tensor 2 x context 2, the split by hand: losses and gradients of the whole rows, in float64 and one process."""
    tensor_group, context_group, tensor_rank, context_rank = parts(rank, 2)
    case = Case((ROWS, SEQUENCE), VOCAB, with_mask=True, scale=1.5)
    student, teacher, labels, mask = case.tensors(device)
    labels = labels.clamp(min=0)
    columns = torch.cat([torch.arange(s.start, s.stop) for s in context_rows(SEQUENCE, context_rank, 2)])
    mine = columns.to(device)

    def own(full: Tensor) -> Tensor:
        """Of this rank's positions, [s / 2, b, ...] as Megatron lays it out."""
        return full[:, mine].transpose(0, 1)

    halves = [VOCAB // 2] * 2
    logits = own(shard(student, tensor_rank, halves)).contiguous().requires_grad_()
    out = vcrd.validity_calibrated_kl(
        logits,
        own(shard(teacher, tensor_rank, halves)),
        own(labels),
        mask=own(mask),
        group=tensor_group,
        steps=own(STEPS.to(device)),
        steps_group=context_group,
        normalization="mean",
        weight_group=context_group,
        ce_weight=0.25,
    )
    out.loss.sum().backward()
    loss, gradient = expected(student.cpu(), teacher.cpu(), labels.cpu(), mask.cpu())
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss[:, columns].t(), atol=2e-5, rtol=2e-5)
    half = gradient[:, columns].transpose(0, 1)[..., tensor_rank * halves[0] :][..., : halves[0]]
    assert half.abs().max() > 0
    torch.testing.assert_close(logits.grad.cpu().double(), half, atol=1e-5, rtol=1e-4)


def expected(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [b, s] and its sum's gradient [b, s, v]."""
    student = student.double().nan_to_num().requires_grad_()
    stats = reference.statistics(student, teacher, labels, mask=mask)
    weight, _ = reference.weights(
        *reference.log_validities(stats, "label"), steps=STEPS, mask=mask, normalization="mean"
    )
    loss = weight * stats["divergence"] + 0.25 * stats["cross_entropy"]
    loss.sum().backward()
    return loss.detach(), student.grad
