"""What each of two ranks runs in test_automodel.py, and the batch that both cut into shards."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from vcrd.integrations.automodel import CalibratedKDLoss

VOCABULARY = 257  # uneven over two ranks: 129 and 128
IGNORED = -100
TEMPERATURE = 2.0


def batch(
    rows: int = 4, length: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """student logits, teacher logits [rows, length, vocabulary], labels [rows, length]; each row ignores some."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        (3 * torch.randn(rows, length, VOCABULARY, generator=generator)).to(dtype) for _ in range(2)
    )
    labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
    for row in range(rows):
        labels[row, : 2 * row] = IGNORED
    return student, teacher, labels


def loss_and_gradient(
    kd_loss: torch.nn.Module, student: Tensor, teacher: Tensor, labels: Tensor, number: int | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient as backward brings it: a leaf's `grad` of uneven shards would be replicated."""
    student = student.detach().clone().requires_grad_()
    gradients: list[Tensor] = []
    student.register_hook(gradients.append)
    loss = kd_loss(student, teacher, labels, num_batch_labels=number)
    loss.backward()
    return loss.detach(), gradients[0]


def check_shards(rank: int, device: torch.device) -> None:
    """Two ranks give the loss and the gradient of one, however the vocabulary is placed."""
    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
    student, teacher, labels = batch()
    calibrated = CalibratedKDLoss(temperature=TEMPERATURE, divergence="jsd")
    expected, gradient = loss_and_gradient(calibrated, student, teacher, labels, 50)

    def same(found: Tensor, found_gradient: Tensor, part: Tensor = gradient) -> None:
        assert not isinstance(found, DTensor)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(found_gradient, part, rtol=1e-5, atol=1e-8)

    plane = DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("dp", "tp"))
    for on, placements in (
        (mesh, [Shard(-1)]),
        (plane, [Replicate(), Shard(2)]),
        (mesh, [Replicate()]),
    ):
        placed, placed_teacher = (distribute_tensor(x, on, placements) for x in (student, teacher))
        found, found_gradient = loss_and_gradient(calibrated, placed, placed_teacher, labels, 50)
        assert found_gradient.placements == placed.placements and found_gradient.shape == student.shape
        same(found, found_gradient.full_tensor())
    # Replicated from here on, and so are the labels. The teacher is a plain tensor.
    found, found_gradient = loss_and_gradient(
        calibrated, placed, teacher, distribute_tensor(labels, mesh, [Replicate()]), 50
    )
    same(found, found_gradient.full_tensor())

    placed = distribute_tensor(student, mesh, [Shard(-1)])
    columns = (slice(0, 129), slice(129, None))[rank]
    found, found_gradient = loss_and_gradient(calibrated, placed, teacher[..., columns], labels, 50)
    same(found, found_gradient.full_tensor())
    explicit = CalibratedKDLoss(temperature=TEMPERATURE, divergence="jsd", tp_group=dist.group.WORLD)
    same(
        *loss_and_gradient(explicit, student[..., columns], teacher[..., columns], labels, 50),
        gradient[..., columns],
    )


def check_own(rank: int, device: torch.device) -> None:
    """With validity "uniform" and forward KL both ranks have the loss and the gradient of Automodel's own."""
    from nemo_automodel.components.loss.kd_loss import KDLoss

    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
    student, teacher, labels = batch()
    student, teacher = (distribute_tensor(x, mesh, [Shard(-1)]) for x in (student, teacher))
    for number in (None, 50):
        ours, theirs = (
            loss_and_gradient(kd_loss, student, teacher, labels, number)
            for kd_loss in (
                CalibratedKDLoss(temperature=TEMPERATURE, validity="uniform"),
                KDLoss(temperature=TEMPERATURE),
            )
        )
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(ours[1].to_local(), theirs[1].to_local(), rtol=1e-4, atol=1e-7)


def check_refusals(rank: int, device: torch.device) -> None:
    """Each is an error on both ranks, so none waits for the other."""
    mesh = DeviceMesh("cpu", [0, 1])
    student, teacher, labels = batch()
    calibrated = CalibratedKDLoss()

    def refused(
        message: str, student: Tensor, teacher: Tensor, kd_loss: CalibratedKDLoss = calibrated
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            kd_loss(student, teacher, labels)

    def placed(logits: Tensor, *placements, on: DeviceMesh = mesh) -> DTensor:
        return DTensor.from_local(logits, on, placements, run_check=False)

    for placement in (Shard(0), Shard(1), Partial(), _StridedShard(2, split_factor=2)):
        refused("student_logits: expected Replicate in each", placed(student, placement), teacher)
    both = DeviceMesh("cpu", [[0], [1]])
    refused(
        "student_logits: expected Replicate in each", placed(student, Shard(0), Shard(2), on=both), teacher
    )
    reversed_mesh = DeviceMesh("cpu", [1, 0])
    refused("a mesh whose ranks ascend", placed(student, Shard(2), on=reversed_mesh), teacher)
    refused("teacher_logits: expected placed as", placed(student, Shard(2)), placed(teacher, Replicate()))
    refused("teacher_logits: expected placed as", student, placed(teacher, Replicate()))
    with_group = CalibratedKDLoss(tp_group=dist.group.WORLD)
    refused("tp_group: expected None or the group", placed(student, Replicate()), teacher, with_group)
    # The borders of torch.tensor_split are not those of Shard: Automodel's separate meshes may cut a teacher so.
    widths = [(129, 128), (128, 129)][rank]
    uneven = placed(student[..., : widths[0]], Shard(2))
    refused(
        "vocab_size: needed where student and teacher are padded differently",
        uneven,
        teacher[..., : widths[1]],
    )
