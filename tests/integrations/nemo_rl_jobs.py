"""A micro-batch as NeMo-RL gives it to a loss of its off-policy distillation, and what each rank of the tests runs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.integrations.nemo_rl import ValidityCalibratedLoss

ROWS, SEQUENCE, VOCAB, TEACHER_COLUMNS = 4, 6, 45, 52
OPTIONS = dict(vocab_size=VOCAB, validity="confidence", divergence="jsd", temperature=2.0, ce_weight=0.25)


def case() -> SimpleNamespace:
    """Two padded output layers, tokens of which some do not count, and one sample that counts not at all."""
    draw = torch.Generator().manual_seed(3)
    token_mask = torch.rand(ROWS, SEQUENCE, generator=draw) < 0.7
    token_mask[:, 2] = True
    return SimpleNamespace(
        student=1.5 * torch.randn(ROWS, SEQUENCE, VOCAB, generator=draw),
        teacher=1.5 * torch.randn(ROWS, SEQUENCE, TEACHER_COLUMNS, generator=draw),
        tokens=torch.randint(VOCAB, (ROWS, SEQUENCE), generator=draw),
        token_mask=token_mask.long(),
        sample_mask=torch.tensor([1.0, 1.0, 0.0, 1.0]),
    )


def valid_tokens(data: SimpleNamespace) -> Tensor:
    return (data.token_mask[:, 1:] * data.sample_mask[:, None]).sum()


def call(loss_fn, data: SimpleNamespace, student: Tensor, rows=slice(None), columns=slice(None), **groups):
    """The loss for samples `rows` and positions `columns` of the batch."""
    align = SimpleNamespace(
        student_input_ids=data.tokens[rows, columns],
        student_token_mask=data.token_mask[rows, columns],
        sample_mask=data.sample_mask[rows],
    )
    return loss_fn(
        data={"input_ids": data.tokens[rows]},
        global_valid_seqs=data.sample_mask.sum(),
        global_valid_toks=valid_tokens(data),
        logits=student,
        student_logits_contig=student,
        teacher_full_logits_by_idx={0: data.teacher[rows, columns]},
        aligns_by_idx={0: align},
        **groups,
    )


def ranks(split: str) -> tuple[float, Tensor, dict]:
    """On each of two ranks that split the vocabulary or the positions: loss, gradient of its part, figures."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    data, rank, world = case(), dist.get_rank(), dist.new_group()
    loss_fn = ValidityCalibratedLoss(**OPTIONS)
    if split == "positions":
        columns = slice(rank * SEQUENCE // 2, (rank + 1) * SEQUENCE // 2)
        student = data.student[:, columns].clone().requires_grad_()
        loss, figures = call(loss_fn, data, student, columns=columns, cp_group=world)
    elif split == "DTensor":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        student = data.student.split([23, 22], -1)[rank].clone().requires_grad_()
        sharded = DTensor.from_local(
            student, mesh, [Shard(2)], shape=data.student.shape, stride=data.student.stride()
        )
        loss, figures = call(loss_fn, data, sharded, tp_group=mesh.get_group("tp"))
    else:
        padded = torch.nn.functional.pad(data.student, (0, 3))
        student = padded.chunk(2, -1)[rank].clone().requires_grad_()
        loss, figures = call(loss_fn, data, student, tp_group=world)
    loss.backward()
    return float(loss.detach()), student.grad, figures
