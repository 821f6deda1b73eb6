"""NVIDIA ModelOpt's distillation (`modelopt.torch.distill`).

A Megatron model, in Megatron-LM's or Megatron-Bridge's loop:

    model = mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": cfg.criterion,
                                                    "loss_balancer": cfg.loss_balancer})])
    adjust_distillation_model_for_mcore(model, cfg)
    vcrd.integrations.modelopt.attach(model, vcrd.LossConfig(divergence="jsd"))

A plain torch model, in a loop of your own:

    model = mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": LogitsLoss()})])
    output = model(tokens)
    loss = model.compute_kd_loss(labels=labels, loss_reduction_fn=lambda loss: loss.sum() / tokens_that_count)

Works with nvidia-modelopt 0.47, and imports nothing of it. ModelOpt's loss balancer finds the loss of the logits by its
class, whose name must contain "Logits".
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from vcrd.errors import expected, wrong_type
from vcrd.loss.api import validity_calibrated_kl
from vcrd.loss.config import LossConfig, refuse_given_validity

Model = TypeVar("Model", torch.nn.Module, list[torch.nn.Module])


class LogitsLoss(_Loss):
    """A criterion for plain torch models that hold the whole vocabulary. Nothing is reduced.

    The divergence is multiplied by the square of the temperature, as that of ModelOpt's `LogitsDistillationLoss` is.

    Args:
        config: default `LossConfig()`. ValueError for validity "scores" and "privileged", because ModelOpt gives a
            criterion nothing for them, and for a `ce_weight`, because the model's loss balancer adds the cross-entropy.
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__(reduction="none")
        self.config = _checked(config)
        if self.config.ce_weight != 0:
            what = "0, because a loss balancer adds the student's own loss"
            raise expected("ce_weight", what, self.config.ce_weight)

    def forward(
        self, student: Any, teacher: Any, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss per token [...], float32.

        Args:
            student, teacher: logits [..., vocabulary], or outputs that have them as `logits`.
            labels: [...], each at the position whose logits predict it: those of a Hugging Face batch must be shifted.
            mask: [...]; where it is 0 the loss is 0. Default: labels of 0 and above count.

        `compute_kd_loss` passes its keywords on to every criterion. Collectives: none. Errors: those of
        `validity_calibrated_kl`.
        """
        if mask is None and isinstance(labels, Tensor):
            mask = labels >= 0
        student, teacher = (getattr(output, "logits", output) for output in (student, teacher))
        out = validity_calibrated_kl(student, teacher, labels, config=self.config, mask=mask)
        return out.loss * self.config.temperature**2


class MegatronLogitsLoss(_Loss):
    """The criterion for Megatron models, in place of `LogitsKLLoss`. `attach` gives it the labels and the mask.

    As in `LogitsKLLoss`, nothing is multiplied by the square of the temperature.

    Args:
        config: default `LossConfig()`. ValueError for validity "scores" and "privileged", because ModelOpt gives a
            criterion nothing for them.
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__(reduction="none")
        self.config = _checked(config)
        self._given: tuple[Tensor | None, Tensor | None] | None = None

    def see(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the converted model, whose own forward has no names for its arguments."""
        names = inspect.signature(model.original_cls.forward)
        given = names.bind_partial(model, *args, **kwargs).arguments
        self._given = given.get("labels"), given.get("loss_mask")

    def forward(self, student: Any, teacher: Any) -> tuple[Tensor, bool, bool]:
        """The loss per token [b, s], float32, and that it needs neither a sum over tensor ranks nor a split mask.

        Args:
            student, teacher: logits [s, b, vocabulary / tp], or the output layer's (logits, bias).

        Collectives, over the
        tensor-parallel group: those of `validity_calibrated_kl`. ValueError unless the model was called before.
        """
        from megatron.core import parallel_state

        if self._given is None:
            raise expected("model", "one forward of a model with `attach` before each loss", "none")
        (labels, mask), self._given = self._given, None
        if mask is None and (name := self.config.pooled):
            by = f"{name} {getattr(self.config, name)!r}"
            what = f"one as the model's argument for {by}, by which a token's weight depends on it"
            raise expected("loss_mask", what, "none")
        if mask is None and labels is not None:
            mask = labels >= 0
        student, teacher = (x[0] if isinstance(x, tuple) else x for x in (student, teacher))
        labels, mask = (None if x is None else x.transpose(0, 1) for x in (labels, mask))
        group = parallel_state.get_tensor_model_parallel_group()
        group = group if group.size() > 1 else None
        out = validity_calibrated_kl(student, teacher, labels, config=self.config, mask=mask, group=group)
        return out.loss.transpose(0, 1).contiguous(), False, False


def _checked(config: LossConfig | None) -> LossConfig:
    config = LossConfig() if config is None else config
    if not isinstance(config, LossConfig):
        raise wrong_type("config", "a LossConfig or None", config)
    refuse_given_validity(
        config, "one without scores or a second answer, which ModelOpt does not give the loss"
    )
    return config


def attach(model: Model, config: LossConfig | None = None) -> Model:
    """Replaces the criterion of the logits in a converted Megatron model, and gives the new one labels and mask.

    Args:
        model: what `mtd.convert` returned, `adjust_distillation_model_for_mcore` applied, wrapped by Megatron or not;
            or the list with it that Megatron-Bridge gives a pre-wrap hook. Call it on every rank: on stages of a
            pipeline other than the last, which have no criterion, only the arguments are checked.
        config: may also be None if the model already has a `MegatronLogitsLoss` from its conversion.

    The tokens that count are those of the model's argument `loss_mask`, or else those with a label of 0 and above.
    Losses of hidden states stay as they are. Returns `model`.

    Raises TypeError or ValueError that names the argument, on every rank of a stage alike.
    """
    from vcrd.megatron.layout import unwrap

    loss = MegatronLogitsLoss(config)
    chunks = model if isinstance(model, list) else [model]
    if len(chunks) != 1:
        raise expected("model", "one chunk, because ModelOpt does not interleave stages", len(chunks))
    chunk = unwrap(chunks[0])
    _check_model(chunk)
    found = [layers for layers, own in chunk._layers_to_loss.items() if "Logits" in type(own).__name__]
    if len(found) != int(chunk.post_process):
        raise expected("criterion", "one of the logits on the last stage, none on others", len(found))
    for layers in found:
        own = chunk._layers_to_loss[layers]
        if isinstance(own, MegatronLogitsLoss):
            if config is not None:
                raise expected("config", "None, because the model's criterion has its own", "a second one")
            loss = own
        else:
            _check_replaced(own)
        chunk._layers_to_loss[layers] = loss
        # Among ModelOpt's own hooks, so that its export removes it too.
        chunk._hook_handles.add(chunk.register_forward_pre_hook(loss.see, with_kwargs=True))
    return model


def _check_model(chunk: torch.nn.Module) -> None:
    if not (hasattr(chunk, "_layers_to_loss") and hasattr(chunk, "compute_language_model_loss")):
        raise wrong_type("model", "a Megatron language model that mtd.convert returned", chunk)
    if not getattr(chunk.loss_balancer, "_skip_original_loss", True):
        raise expected(
            "skip_lm_loss",
            "True, because ModelOpt's balancer otherwise scales the loss of each micro-batch to its cross-entropy, "
            "which undoes the level of the weights; ce_weight of LossConfig adds the cross-entropy",
            "False",
        )
    for one in (chunk, chunk.teacher_model):
        if getattr(one.config, "use_mup", False):
            raise expected("model", "an output layer whose output is the logits", "use_mup, which scales it")


def _check_replaced(own: torch.nn.Module) -> None:
    got = type(own).__name__, getattr(own, "_temperature", None), getattr(own, "_reverse", None)
    if got != ("LogitsKLLoss", 1, False):
        raise expected(
            "criterion",
            "LogitsKLLoss with temperature 1 and reverse False, because LossConfig names the temperature and the "
            "divergence, and the whole vocabulary counts",
            "{} with temperature {} and reverse {}".format(*got),
        )
