"""The loss in the Trainer of Hugging Face transformers, and in a loop of your own over its models.

    from vcrd.integrations.transformers import CalibratedTrainer

    trainer = CalibratedTrainer(model, args, teacher_model=teacher, loss_config=vcrd.LossConfig(divergence="jsd"),
                                train_dataset=dataset, data_collator=collator, processing_class=tokenizer)
    trainer.train()

`CalibratedLossMixin` does the same for other subclasses of Trainer. The trainers of TRL are in `vcrd.integrations.trl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from vcrd.errors import check_bool, check_choice, expected, wrong_type
from vcrd.loss.api import CalibratedLoss, validity_calibrated_kl
from vcrd.loss.config import HeadConfig, LossConfig
from vcrd.loss.fused_head import fused_validity_calibrated_kl
from vcrd.teacher_logits import HiddenStates

IGNORED = -100  # the label of a token that does not count
# What a batch may hold for each token besides its label, and the value where the label has no successor.
COLUMNS = {"steps": -1, "student_validity": 1.0, "teacher_validity": 1.0}
# Names by which configurations of transformers multiply their logits.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class DistillationLoss:
    """The loss of each token of a batch, from a student and a teacher of transformers. For one device of a loop.

    Args:
        student, teacher: causal language models, the student perhaps a PeftModel. The teacher is put into eval mode.
        config: default `LossConfig()`. Where it has no `vocab_size` and a tokenizer is given, the vocabulary ends with
            the last id of the tokenizer: the columns of both models past it are padding, and may differ in number.
        tokenizer: of both models.
        fused_head: compute the loss from the last hidden states (`fused_validity_calibrated_kl`), of the tokens with a
            label only. Neither model's logits are built then. The output layer must be a plain `nn.Linear` without
            bias; a scale and a softcap of its logits are read from the configuration, and checked by running each model
            once.
        product_dtype: what hidden states and output layer are rounded to for their product; None for their own dtypes.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: LossConfig | None = None,
        *,
        tokenizer: Any = None,
        fused_head: bool = False,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        config = LossConfig() if config is None else config
        if not isinstance(config, LossConfig):
            raise wrong_type("loss_config", "a LossConfig or None", config)
        for name, model in (("student", student), ("teacher_model", teacher)):
            if not isinstance(model, nn.Module):
                raise wrong_type(name, "a model", model)
        if teacher is student:
            raise expected("teacher_model", "another model than the student", "the student")
        if config.validity == "privileged":
            what = "another one, because no judge answers beside the teacher"
            raise expected("validity", what, "'privileged'")
        if isinstance(tokenizer, str):
            raise wrong_type("tokenizer", "a tokenizer or None", tokenizer)
        if not isinstance(product_dtype, (torch.dtype, type(None))):
            raise wrong_type("product_dtype", "a torch.dtype or None", product_dtype)
        check_bool("fused_head", fused_head)
        self.teacher = teacher.eval()
        self.config = _with_vocabulary(config, tokenizer)
        self.product_dtype = product_dtype
        self.student_layer = OutputLayer.of("student", student) if fused_head else None
        self.teacher_layer = OutputLayer.of("teacher_model", teacher) if fused_head else None

    def __call__(
        self, student: nn.Module, inputs: Mapping[str, Any], labels: Tensor, **columns: Tensor
    ) -> CalibratedLoss:
        """student: that of the constructor, or a wrapper of it, such as DistributedDataParallel.

        inputs: what both models are called with, without labels. labels: [batch, sequence], as transformers has them:
        each the id of the token at its own place, or -100 for one that does not count. With "shift_labels" among the
        inputs these are taken, which stand one place earlier. columns: see `COLUMNS`; [batch, sequence], each value at
        the place of its token. Ids of steps are those of one sequence.

        Returns per-token results in the places of the logits, [batch, sequence]; with `fused_head` those of the tokens
        that count, [tokens], whose losses must then get equal gradients, as of a sum or a mean (`HeadConfig.upstream`).

        Collectives: none but those of the models and of groups in the configuration.
        """
        for name in columns:
            check_choice("columns", name, tuple(COLUMNS))
        inputs = dict(inputs)
        targets = inputs.pop("shift_labels", None)
        if targets is None:
            if not isinstance(labels, Tensor):
                raise wrong_type("labels", "a tensor", labels)
            targets = _one_earlier(labels, IGNORED)
        columns = {name: _one_earlier(value, COLUMNS[name]) for name, value in columns.items()}
        if "steps" in columns:
            # Equal ids in two sequences are two steps.
            steps = columns["steps"].long()
            rows = torch.arange(len(steps), device=steps.device)[:, None] << 32
            columns["steps"] = torch.where(steps >= 0, steps + rows, -1)
        inputs["use_cache"] = False
        counts = targets != IGNORED
        if self.student_layer is not None:
            return self._fused(student, inputs, targets, counts, columns)
        with torch.no_grad():
            teacher_logits = _logits("teacher_model", self.teacher(**inputs))
        # The call holds no other reference, so that `inplace_gradient="if_unused"` finds none.
        return validity_calibrated_kl(
            _logits("student", student(**inputs)),
            teacher_logits,
            targets,
            config=self.config,
            mask=counts,
            **columns,
        )

    def _fused(self, student, inputs, targets, counts, columns) -> CalibratedLoss:
        student_layer, teacher_layer = self.student_layer, self.teacher_layer
        states = student_layer.states(student, inputs)
        with torch.no_grad():
            teacher_states = teacher_layer.states(self.teacher, inputs)
        if states.shape[:-1] != targets.shape:
            raise expected(
                "student", f"hidden states of {list(targets.shape)} tokens", list(states.shape[:-1])
            )
        weight, teacher_weight = student_layer.head.weight, teacher_layer.head.weight
        if self.product_dtype is not None:
            states, weight, teacher_states, teacher_weight = (
                part.to(self.product_dtype) for part in (states, weight, teacher_states, teacher_weight)
            )
        return fused_validity_calibrated_kl(
            states[counts],
            weight,
            HiddenStates(teacher_states[counts], teacher_weight, teacher_layer.scale, teacher_layer.softcap),
            targets[counts],
            config=self.config,
            # Every token has the same factor in the mean over tokens.
            head=HeadConfig(scale=student_layer.scale, softcap=student_layer.softcap, upstream="even"),
            **{name: value[counts] for name, value in columns.items()},
        )


@dataclass(frozen=True)
class OutputLayer:
    """What makes a model's logits of its last hidden states: scale * head(states), then softcap * tanh(. / softcap)."""

    backbone: nn.Module  # everything below `head`
    head: nn.Linear
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, name: str, model: nn.Module) -> OutputLayer:
        """That of a causal language model. Raises ValueError where the model's own logits are not what it says."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(base, "get_output_embeddings"):
            raise wrong_type(name, "a causal language model of transformers for fused_head", model)
        head, text = base.get_output_embeddings(), base.config.get_text_config()
        # Adapters of PEFT on the layer are subclasses or wrappers.
        if type(head) is not nn.Linear or head.bias is not None:
            what = "an output layer that is a plain nn.Linear without bias for fused_head"
            raise expected(name, what, f"{head}".split("\n")[0])
        scale = next((value for key in _MULTIPLIERS if (value := getattr(text, key, None)) is not None), 1.0)
        if getattr(text, "logits_scaling", None) is not None:
            scale = 1 / text.logits_scaling
        layer = cls(base.base_model, head, scale, getattr(text, "final_logit_softcapping", None))
        layer._check(name, base)
        return layer

    @torch.no_grad()
    def _check(self, name: str, model: nn.Module) -> None:
        was_training = model.training
        inputs = {"input_ids": torch.arange(2, device=self.head.weight.device)[None]}
        found = []
        hook = self.head.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0]))
        try:
            logits = model.eval()(**inputs, use_cache=False).logits[:, -1:].float()
            states = self.states(model, inputs)
        finally:
            hook.remove()
            model.train(was_training)
        one_place = found[-1].shape[1] == 1
        ours = self.scale * nn.functional.linear(states[:, -1:], self.head.weight.to(states.dtype)).float()
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        # Room for 16-bit rounding. A factor or a layer in between would be far outside.
        if not one_place or not (ours - logits).abs().max() <= 2e-2 * logits.abs().max():
            what = "a model with logits_to_keep whose logits are scale, head and softcap of its last hidden states"
            raise expected(name, f"{what} for fused_head", f"{type(model).__name__}, which has others")

    def states(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The last hidden states, [batch, sequence, hidden size]; `model` is called whole, so that its wrappers act."""
        found = []
        hook = self.backbone.register_forward_hook(lambda module, arguments, output: found.append(output[0]))
        try:
            model(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
        if not found:
            raise expected("student", "the model of the constructor, or a wrapper of it", "another model")
        return found[0]


def _with_vocabulary(config: LossConfig, tokenizer: Any) -> LossConfig:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if config.vocab_size is not None or not hasattr(tokenizer, "get_vocab"):
        return config
    # Not the number of tokens: there may be ids that no token has.
    return replace(config, vocab_size=max(tokenizer.get_vocab().values()) + 1)


def _one_earlier(values: Tensor, last: float) -> Tensor:
    """Values of tokens [batch, sequence], each in the place whose logits predict its token."""
    return nn.functional.pad(values[:, 1:], (0, 1), value=last)


def _logits(name: str, outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise expected(name, "a model that returns logits", f"{type(outputs).__name__} without any")
    return logits


class LogsTokenMeans:
    """Adds to the log of a Trainer what the loss did: means over the tokens of all processes since the last log."""

    _TOKEN_MEANS = ("weight", "relative_validity", "divergence", "cross_entropy")
    _token_sums: Tensor | None = None

    def add_to_log(self, out: CalibratedLoss, count: Tensor) -> None:
        """count: the tokens that count in `out`; all others hold zeros. Waits for no device."""
        fields = (out.weight, out.relative_validity, out.stats.divergence, out.stats.cross_entropy)
        sums = torch.stack([*(field.detach().double().sum() for field in fields), count.double()])
        self._token_sums = sums if self._token_sums is None else self._token_sums + sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Collectives: one all-reduce of five numbers, where a step was trained since the last log."""
        if self._token_sums is not None:
            *sums, count = self.accelerator.reduce(self._token_sums).tolist()
            self._token_sums = None
            logs.update(
                {name: value / max(count, 1) for name, value in zip(self._TOKEN_MEANS, sums, strict=True)}
            )
        super().log(logs, *args, **kwargs)


def step_sum(trainer: Trainer, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The losses of this micro-batch's tokens as their part of the mean over all tokens of the optimizer step.

    `num_items_in_batch` is the Trainer's count of labelled tokens, over all micro-batches of the step and, with
    `average_tokens_across_devices`, over all processes. DistributedDataParallel divides by their number once more.
    """
    if num_items_in_batch is None:
        what = "the Trainer's count of labelled tokens"
        why = "None: the batch has no labels, or the model's forward takes no keyword arguments"
        raise expected("num_items_in_batch", what, why)
    if not isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = torch.tensor(num_items_in_batch)
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return loss.sum() * processes / num_items_in_batch.to(loss.device).clamp(min=1)


def check_trainer(trainer: Trainer, fused_head: bool) -> None:
    """Raises ValueError where the Trainer would do something to the loss that is not known to be right."""
    args = trainer.args
    for name, value, right in (
        ("n_gpu", args.n_gpu, (0, 1)),  # DataParallel: start one process for each GPU
        ("label_smoothing_factor", args.label_smoothing_factor, (0,)),
        ("output_router_logits", getattr(trainer.model.config, "output_router_logits", False), (None, False)),
        ("tensor parallel size", trainer.get_tp_size(), (1,)),
        ("context parallel size", trainer.get_cp_size(), (1,)),
        ("sequence parallel size", trainer.get_sp_size(), (1,)),
    ):
        if value not in right:
            raise expected(name, f"{right[-1]} with a calibrated loss", value)
    if fused_head and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.torch_compile):
        what = "neither FSDP nor DeepSpeed nor torch_compile, which hide the output layer"
        raise expected("fused_head", what, args.parallel_mode)


def head_dtype(trainer: Trainer) -> torch.dtype | None:
    """What mixed precision computes the output layer's product in."""
    return torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else None


class CalibratedLossMixin(LogsTokenMeans):
    """The loss in a subclass of Trainer whose batches are the arguments of its model, labels included.

        class CalibratedSFTTrainer(CalibratedLossMixin, trl.SFTTrainer): ...

    These arguments are given by name, besides those of the Trainer.

    Args:
        teacher_model: placed on the Trainer's device, in eval mode, without gradients. Not wrapped by DDP.
        loss_config: see `LossConfig`; validity "label" takes the labels of the data set as verified. The vocabulary
            ends with the last id of `processing_class`, if it is a tokenizer, unless `vocab_size` is set.
        fused_head: see `DistillationLoss`.
        columns: those of `COLUMNS` that every training batch has, [batch, sequence]. They pass
            `remove_unused_columns`. The data collator must pad them.

    In training, the gradient of one optimizer step is that of the mean loss over all labelled tokens of its
    micro-batches and processes. The log has the means of weight, relative validity, divergence and cross-entropy.
    Evaluation is that of the Trainer: plain cross-entropy.

    Collectives: those of the Trainer, and one all-reduce of five numbers for each log.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module,
        loss_config: LossConfig | None = None,
        fused_head: bool = False,
        columns: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if isinstance(columns, str):
            raise wrong_type("columns", "a sequence of names", columns)
        for name in columns:
            check_choice("columns", name, tuple(COLUMNS))
        self.columns = tuple(columns)
        scores = ("student_validity", "teacher_validity")
        if getattr(loss_config, "validity", None) == "scores" and not {*scores} <= {*columns}:
            raise expected("columns", f"{' and '.join(scores)} with validity 'scores'", f"{self.columns}")
        super().__init__(*args, **kwargs)
        check_trainer(self, fused_head)
        if self.compute_loss_func is not None:
            raise expected("compute_loss_func", "None with a calibrated loss", self.compute_loss_func)
        if self.is_fsdp_enabled:
            raise expected("fsdp", "none with a teacher, which would not be placed", "one")
        self.distillation = DistillationLoss(
            self.model,
            teacher_model,
            loss_config,
            tokenizer=self.processing_class,
            fused_head=fused_head,
            product_dtype=head_dtype(self),
        )
        self.distillation.teacher = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.columns]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The part of this micro-batch; its outputs are the `CalibratedLoss`. In evaluation that of the Trainer."""
        inputs = dict(inputs)
        columns = {name: inputs.pop(name, None) for name in self.columns}
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        for name in ("labels", *self.columns):
            if (columns if name in columns else inputs).get(name) is None:
                raise expected(name, "in every training batch", f"{', '.join(inputs)}")
        labels = inputs.pop("labels")
        targets = inputs.get("shift_labels", labels[:, 1:])
        out = self.distillation(model, inputs, labels, **columns)
        self.add_to_log(out, (targets != IGNORED).sum())
        loss = step_sum(self, out.loss, num_items_in_batch)
        return (loss, out) if return_outputs else loss


class CalibratedTrainer(CalibratedLossMixin, Trainer):
    """The Trainer of transformers with the loss: see `CalibratedLossMixin`."""
