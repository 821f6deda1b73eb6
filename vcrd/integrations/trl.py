"""The loss in the trainers of TRL: supervised data, GKD, and DistillationTrainer. Needs the package trl.

from vcrd.integrations.trl import CalibratedGKDTrainer

trainer = CalibratedGKDTrainer(model, teacher, args=GKDConfig(...), loss_config=vcrd.LossConfig(validity="confidence"),
                               train_dataset=dataset, processing_class=tokenizer)
"""

from __future__ import annotations

import random
from typing import Any

import torch
from trl import DistillationTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer
from trl.models.utils import unwrap_model_for_generation

from vcrd.errors import expected, wrong_type
from vcrd.integrations.transformers import (
    IGNORED,
    CalibratedLossMixin,
    DistillationLoss,
    LogsTokenMeans,
    check_trainer,
    head_dtype,
    step_sum,
)
from vcrd.loss.config import LossConfig


class CalibratedSFTTrainer(CalibratedLossMixin, SFTTrainer):
    """SFTTrainer with a teacher: its data pipeline and labels, the loss of `CalibratedLossMixin`."""


def config_for_samples(
    config: LossConfig | None, beta: float, default_beta: float, temperature: float, sampled: bool
) -> LossConfig:
    """The loss of a trainer of TRL. Without a config it is the trainer's own divergence with validity "confidence".

    beta: the trainer's: 0 is forward_kl, 1 is reverse_kl, between them the jsd of the same beta.
    sampled: whether the student or the teacher writes the completions. They are not verified tokens then.
    """
    if not isinstance(config, (LossConfig, type(None))):
        raise wrong_type("loss_config", "a LossConfig or None", config)
    if config is None:
        divergence = {0: {"divergence": "forward_kl"}, 1: {"divergence": "reverse_kl"}}
        chosen = divergence.get(beta, {"divergence": "jsd", "beta": beta})
        return LossConfig(validity="confidence", temperature=temperature, **chosen)
    if beta != default_beta:
        raise expected("beta", f"{default_beta}, the default, where loss_config names the divergence", beta)
    if sampled and config.validity in ("label", "scores", "privileged"):
        what = "confidence, margin, uniform or a callable where a model samples the completions"
        raise expected("validity", what, repr(config.validity))
    if sampled and config.ce_weight != 0:
        raise expected("ce_weight", "0 where a model samples the completions", config.ce_weight)
    return config


def never_sample_padding(trainer: Any) -> None:
    """Keeps columns past the vocabulary out of completions: the loss has no probability for them.

    GKDTrainer refuses two models with different numbers of columns, and DistillationTrainer does too, so those of the
    student are those of a teacher that samples. vLLM does not read this.
    """
    columns = trainer.model.get_output_embeddings().weight.shape[0]
    padding = range(trainer.distillation.config.vocab_size or columns, columns)
    config = trainer.generation_config
    config.suppress_tokens = [*(config.suppress_tokens or ()), *padding] or None


class CalibratedGKDTrainer(LogsTokenMeans, GKDTrainer):
    """GKDTrainer with this loss: its data, its sampling by `lmbda` and `seq_kd`, its evaluation.

    Arguments besides those of GKDTrainer, by name: `loss_config` (see `config_for_samples`) and `fused_head` (see
    `DistillationLoss`). As there, `temperature` of the arguments is that of sampling.

    All samples of an optimizer step are drawn before its first micro-batch, so that the tokens it is divided by are
    those that were sampled. GKDTrainer divides by the number that the data set had in their place.

    Collectives: those of GKDTrainer; a second gather of the count of tokens for each optimizer step; one all-reduce of
    five numbers for each log.
    """

    def __init__(
        self,
        *args: Any,
        loss_config: LossConfig | None = None,
        fused_head: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_trainer(self, fused_head)
        sampled = self.lmbda > 0 or self.seq_kd
        default_beta = type(self.args).__dataclass_fields__["beta"].default
        self.distillation = DistillationLoss(
            self.model,
            self.teacher_model,
            config_for_samples(loss_config, self.beta, default_beta, 1.0, sampled),
            tokenizer=self.processing_class,
            fused_head=fused_head,
            product_dtype=head_dtype(self),
        )
        never_sample_padding(self)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._sampled(self._prepare_inputs(batch)) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _sampled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with completions of the student, of the teacher, or its own, as GKDTrainer chooses."""
        if random.random() <= self.lmbda:
            model = self.model_wrapped
        elif self.seq_kd:
            model = self.teacher_model
        else:
            return inputs
        with unwrap_model_for_generation(
            model,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as writer:
            ids, attention, labels = self.generate_on_policy_outputs(writer, inputs, self.generation_config)
        return {**inputs, "input_ids": ids, "attention_mask": attention, "labels": labels}

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Past that of GKDTrainer, which would sample now.
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The part of this micro-batch; its outputs are the `CalibratedLoss`. In evaluation that of GKDTrainer."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        out = self.distillation(
            model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, labels
        )
        self.add_to_log(out, (labels[:, 1:] != IGNORED).sum())
        loss = step_sum(self, out.loss, num_items_in_batch)
        return (loss, out) if return_outputs else loss


class CalibratedDistillationTrainer(LogsTokenMeans, DistillationTrainer):
    """DistillationTrainer with this loss from the hidden states: its sampling, tools, vLLM, evaluation.

    The argument besides those of DistillationTrainer, by name: `loss_config` (see `config_for_samples`). Without one,
    `temperature` of the arguments is also that of the divergence, as there. Text only.

    Collectives: those of DistillationTrainer; one all-reduce of five numbers for each log.
    """

    def __init__(self, *args: Any, loss_config: LossConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_trainer(self, fused_head=True)
        default_beta = type(self.args).__dataclass_fields__["beta"].default
        config = config_for_samples(loss_config, self.beta, default_beta, self.temperature, sampled=True)
        self.distillation = DistillationLoss(
            self.model,
            self.teacher_model,
            config,
            tokenizer=self.processing_class,
            fused_head=True,
            product_dtype=head_dtype(self),
        )
        never_sample_padding(self)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        """Loss of the batch, its sum of entropies and its tokens. In evaluation those of DistillationTrainer."""
        if not self.model.training:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        pictures = [name for name in inputs if name.startswith(("pixel", "image", "spatial"))]
        if pictures:
            raise expected("inputs", "text", f"{', '.join(pictures)}")
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        counts = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        labels = torch.full_like(ids, IGNORED)
        labels[:, -counts.shape[1] :] = torch.where(counts, inputs["completion_ids"], IGNORED)
        out = self.distillation(unwrapped_student, {"input_ids": ids, "attention_mask": attention}, labels)
        count = counts.sum()
        self.add_to_log(out, count)
        # Theirs is already over all micro-batches, and divided by the number of processes.
        tokens = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return out.loss.sum() / tokens, out.stats.student_entropy.sum(), count
