"""NVIDIA NeMo Automodel: `CalibratedKDLoss` takes the place of `nemo_automodel.components.loss.kd_loss.KDLoss`.

In the YAML file of a recipe (`recipes/llm/kd.py`):

    kd_loss_fn:
      _target_: vcrd.integrations.automodel.CalibratedKDLoss
      ignore_index: -100
      temperature: 1.0
      divergence: jsd            # any field of vcrd.LossConfig

Works with nemo-automodel 0.7, and imports nothing of it. Automodel replaces a loss class that is called `KDLoss` by its
own (`build_loss_config`), so this one has another name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from vcrd.errors import check_integer, expected, wrong_type
from vcrd.loss.api import validity_calibrated_kl
from vcrd.loss.config import loss_config, refuse_given_validity


class CalibratedKDLoss(torch.nn.Module):
    """The validity-calibrated loss with the arguments of Automodel's `KDLoss`.

    Args:
        ignore_index: label of the tokens that do not count.
        temperature: T, of both models in the divergence. The loss is multiplied by T squared, as Automodel's is (Hinton
            et al., arXiv 1503.02531).
        tp_group: the ranks that hold the shards of plain tensors; None if these hold the whole vocabulary. The
            placements of DTensors name it.
        fp32_upcast, chunk_size: accepted so that a recipe needs no change, and not used. All arithmetic is in float32,
            and no matrix of probabilities is made.
        options: fields of `LossConfig`.

    Automodel gives the loss labels and nothing else. So validity "scores" and "privileged", and `steps`, cannot be used
    here. `ce_weight` is refused, because the recipe's `kd_ratio` adds the cross-entropy.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: dist.ProcessGroup | None = None,
        chunk_size: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_integer("ignore_index", ignore_index)
        if not isinstance(tp_group, (dist.ProcessGroup, type(None))):
            raise wrong_type("tp_group", "a process group or None", tp_group)
        self.config = loss_config(None, {"temperature": temperature, **options})
        if self.config.ce_weight != 0:
            raise expected(
                "ce_weight", "0, because the recipe's kd_ratio adds the cross-entropy", self.config.ce_weight
            )
        refuse_given_validity(
            self.config, "one without scores or a second answer, which Automodel does not give the loss"
        )
        # The recipe reads these two.
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.tp_group = tp_group

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """The sum over the tokens that count, divided by `num_batch_labels`, or by their number where it is None.

        Args:
            student_logits, teacher_logits: [..., vocabulary], float32, bfloat16 or float16. DTensors may be replicated,
                or sharded along the vocabulary in one dimension of the mesh, evenly or not, and then both alike; the
                teacher's may also be a plain tensor with this rank's columns. Shards of plain tensors need `tp_group`.
            labels: [...], integers, each at the position whose logits predict it.
            num_batch_labels: the tokens that count in all micro-batches of the step.

        Returns a scalar, float32, the same on every rank of a shard group. The gradient of the student's logits is
        placed as they are. Collectives: those of `validity_calibrated_kl` over the shard group.

        Raises TypeError or ValueError that names the argument.
        """
        if not isinstance(student_logits, Tensor):
            raise wrong_type("student_logits", "a tensor", student_logits)
        check_integer("num_batch_labels", num_batch_labels, least=0, optional=True)
        student, teacher, group = self._local(student_logits, teacher_logits)
        if isinstance(labels, DTensor):
            labels = labels.full_tensor()
        if not isinstance(labels, Tensor):
            raise wrong_type("labels", "a tensor", labels)
        if labels.numel() != student.shape[:-1].numel():
            raise expected("labels", f"one for each of {student.shape[:-1].numel()} tokens", labels.numel())
        labels = labels.reshape(student.shape[:-1])
        mask = labels != self.ignore_index
        out = validity_calibrated_kl(student, teacher, labels, config=self.config, mask=mask, group=group)
        # Where no token counts, the sum is 0, and so is each gradient.
        count = mask.sum().clamp(min=1) if num_batch_labels is None else max(num_batch_labels, 1)
        return out.loss.sum() * self.temperature**2 / count

    def _local(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, dist.ProcessGroup | None]:
        """This rank's columns of both, and the ranks that hold the others'; None if there are none."""
        group = self.tp_group
        if isinstance(student, DTensor):
            group = _shard_group("student_logits", student)
            if self.tp_group not in (None, group):
                raise expected("tp_group", "None or the group of the DTensor's shards", "another group")
        if isinstance(teacher, DTensor) and _placed(teacher) != _placed(student):
            raise expected(
                "teacher_logits", f"placed as student_logits, {_placed(student)}", _placed(teacher)
            )
        student, teacher = (x.to_local() if isinstance(x, DTensor) else x for x in (student, teacher))
        return student, teacher, group


def _placed(logits: Tensor) -> tuple | str:
    return (logits.device_mesh, logits.placements) if isinstance(logits, DTensor) else "a plain tensor"


def _shard_group(name: str, logits: DTensor) -> dist.ProcessGroup | None:
    """The ranks that share the vocabulary of `logits`; None if each holds all. ValueError for other placements."""
    vocabulary, mesh = logits.ndim - 1, logits.device_mesh
    # Compared by type: a strided shard, for example, is a Shard whose columns are in another order.
    sharded = [n for n, placement in enumerate(logits.placements) if type(placement) is not Replicate]
    placements = [logits.placements[n] for n in sharded]
    if len(sharded) > 1 or any(type(p) is not Shard or p.dim % logits.ndim != vocabulary for p in placements):
        what = "Replicate in each dimension of the mesh, or Shard along the vocabulary in one of them"
        raise expected(name, what, tuple(logits.placements))
    if not sharded:
        return None
    if not bool((mesh.mesh.diff(dim=sharded[0]) > 0).all()):
        raise expected(name, "a mesh whose ranks ascend, as those of its groups do", mesh.mesh.tolist())
    return mesh.get_group(sharded[0])
