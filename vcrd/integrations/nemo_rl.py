"""NeMo-RL: a loss function for its off-policy distillation, in which a teacher sends whole logits.

    loss_fn = ValidityCalibratedLoss(vcrd.LossConfig(vocab_size=len(student_tokenizer)))

It takes the place of the loss function that `nemo_rl.algorithms.xtoken_off_policy_distillation.setup` returns, in a
script that then calls `xtoken_off_policy_distillation_train`. The one teacher must have the student's tokenizer: its
projection matrix is None.

The on-policy distillation of NeMo-RL (`nemo_rl.algorithms.distillation`) cannot be served. There a teacher sends its k
largest logits without the sum over the vocabulary, so the mass of all other tokens is not known.

Written against the public source of NVIDIA-NeMo/RL at 7ea279a (22 August 2026).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss.api import validity_calibrated_kl
from vcrd.loss.config import LossConfig, loss_config, refuse_given_validity, refuse_pooled


class ValidityCalibratedLoss:
    """NeMo-RL's protocol `LossFunction`. config, options: as of `vcrd.validity_calibrated_kl`.

    The divergence is multiplied by the square of the temperature, as NeMo-RL's own is.
    Raises ValueError for settings that NeMo-RL's batches cannot serve, and without a `vocab_size`.
    """

    # What NeMo-RL reads of such a loss: one teacher, with the student's tokenizer.
    num_teachers = 1
    projection_matrix_paths = (None,)

    def __init__(self, config: LossConfig | None = None, **options: Any) -> None:
        self.config = loss_config(config, options)
        if self.config.vocab_size is None:
            what = "len(student_tokenizer), because both models may pad their output layers"
            raise expected("vocab_size", what, "None")
        refuse_given_validity(self.config, "one that is read from the two models")
        refuse_pooled(self.config)

    @property
    def loss_type(self) -> Any:
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.TOKEN_LEVEL

    @property
    def input_type(self) -> Any:
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.DISTILLATION_CROSS_TOKENIZER

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        logits: Tensor,
        student_logits_contig: Tensor,
        teacher_full_logits_by_idx: dict[int, Tensor],
        aligns_by_idx: dict[int, Any],
        *,
        tp_group: dist.ProcessGroup | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """This rank's part of the mean over the valid tokens of the global batch, and figures of the same kind.

        student_logits_contig: [b, s, vocabulary / tensor ranks] of this context rank's positions, in their own order: a
            DTensor sharded over its last dimension, or this rank's shard. teacher_full_logits_by_idx: of teacher 0 the
            logits [b, s, vocabulary] at the same positions. aligns_by_idx: of teacher 0 `student_input_ids`,
            `student_token_mask` [b, s] and `sample_mask` [b].

        NeMo-RL adds losses and figures over micro-batches and ranks.

        Collectives: those of `vcrd.validity_calibrated_kl` in `tp_group`; with context parallelism one all-gather of
        two numbers per row in `cp_group`. Raises ValueError as that function does, and for several teachers.
        """
        if len(teacher_full_logits_by_idx) != 1:
            raise expected("teachers", "one", len(teacher_full_logits_by_idx))
        student, first = _own_columns(student_logits_contig, tp_group)
        align, temperature = aligns_by_idx[0], self.config.temperature
        labels, mask = (_local(each) for each in (align.student_input_ids, align.student_token_mask))
        labels, mask = _of_next_token(labels, mask, cp_group)
        mask = mask * (_local(align.sample_mask)[:, None] != 0)
        out = validity_calibrated_kl(
            student,
            teacher_full_logits_by_idx[0][..., first : first + student.shape[-1]],
            labels,
            config=replace(self.config, ce_weight=0.0),
            mask=mask,
            group=tp_group,
        )
        losses = temperature**2 * out.loss + self.config.ce_weight * out.stats.cross_entropy

        def part(values: Tensor) -> Tensor:
            return (values * mask).sum() / (global_valid_toks + 1e-8)  # as NeMo-RL's masked_mean

        loss = part(losses)
        figures = {
            "loss": loss,
            "kl_loss": part(out.stats.divergence),
            "ce_loss": part(out.stats.cross_entropy),
            "weight": part(out.weight),
            "relative_validity": part(out.relative_validity),
        }
        metrics = {name: value.item() for name, value in figures.items()}
        return loss, {**metrics, "num_valid_samples": data["input_ids"].shape[0]}


def _local(values: Tensor) -> Tensor:
    return values.to_local() if hasattr(values, "to_local") else values


def _own_columns(logits: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """This rank's shard, and its first column of the vocabulary."""
    local = _local(logits)
    if group is None:
        return local, 0
    # The shards of a DTensor are equal but for the last ones; those of another tensor are equal.
    width = local.shape[-1] if local is logits else -(-logits.shape[-1] // group.size())
    return local, group.rank() * width


def _of_next_token(labels: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Tokens [b, s] and whether they count, at the positions that predict them: those of all ranks are one sequence."""
    both = torch.stack([labels.long(), (mask != 0).long()])
    after = torch.zeros_like(both[..., :1])  # nothing follows the last position
    if group is not None and group.size() > 1:
        firsts = [torch.empty_like(after) for _ in range(group.size())]
        dist.all_gather(firsts, both[..., :1].contiguous(), group=group)
        after = [*firsts, after][group.rank() + 1]
    labels, mask = torch.cat([both[..., 1:], after], -1)
    return labels, mask
