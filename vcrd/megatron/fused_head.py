"""The student's output layer, taken out of its model for the fused head: the loss multiplies, chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss.api import CalibratedLoss
from vcrd.loss.fused_head import fused_validity_calibrated_kl
from vcrd.megatron.fp8 import refuse_other_output_layer
from vcrd.megatron.output_layer import scale_and_softcap
from vcrd.megatron.output_probe import TOLERANCES, OutputProbe
from vcrd.teacher_logits import HiddenStates, TopKLogits


class FusedHead:
    """One model's output layer: while `captured`, its forward keeps the hidden states, and `loss` starts from them.

    Tied embeddings, the scale of MuP, a soft-cap, sequence parallelism, tensor parallelism and fused gradient
    accumulation are honoured. A model that does anything else to its logits is found out with the first micro-batch,
    and in one of 16 from then on: it is given those of a few test states to finish, and they are compared
    (`OutputProbe`). One that trains on anything else that it makes of its logits is found out in backward.

    What the script's loss_func makes of the losses per token is seen in the first step, by waiting for the device in
    each backward: the same factor for all tokens that count, as Megatron's masked sum, or each its own. On a GPU no
    later backward waits, and `end_step` says whether it went on like that; on CPU, where nothing waits, each looks.

    recompute: whether the setting `fused_head` is "recompute".
    """

    def __init__(
        self, chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None, recompute: bool = False
    ) -> None:
        _check_compatibility(chunk, tensor_group)
        self._layer = chunk.output_layer
        self._group = tensor_group
        self._scale, self._softcap = scale_and_softcap(chunk.config)
        self._gather = tensor_group is not None and bool(getattr(self._layer, "sequence_parallel", False))
        self._probe = OutputProbe(
            *(self._scale, self._softcap, tensor_group, self._gather),
            "fused_head: expected a model whose logits are",
            "set fused_head off",
        )
        # Whether the upstream gradient of the losses is even, as of the first step; None before its end.
        self._even = False if recompute else None
        self._trusted = False  # whether backward goes by it without looking
        self._found_uneven: Tensor | None = None  # of this step's micro-batches, on the device
        self._states: Tensor | None = None
        self._weight: Tensor | None = None

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """While open, the model makes no logits: what it hands to its loss in their place is for `loss` alone."""
        plain, probe = self._layer.forward, self._probe
        own = vars(self._layer).get("forward")  # where someone has replaced it before
        probe.begin()

        def capture(input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> tuple:
            self._states, self._weight = input_, self._layer.weight if weight is None else weight
            followed = input_ if input_.requires_grad else self._weight
            if not probe.due:
                nothing = input_.new_full((*input_.shape[:-1], 1), torch.nan)
                return _ForTheLossAlone.apply(nothing, followed), None
            with torch.no_grad():
                logits, bias = plain(probe.states(input_), weight, *args, **kwargs)
            return _ForTheLossAlone.apply(logits, followed), bias

        self._layer.forward = capture
        try:
            yield
        finally:
            self._states = self._weight = None
            del self._layer.forward
            if own is not None:
                self._layer.forward = own

    def loss(
        self,
        logits: Tensor,
        teacher_logits: Tensor | TopKLogits | HiddenStates,
        labels: Tensor,
        **arguments: Any,
    ) -> CalibratedLoss:
        """`validity_calibrated_kl` of the states that were captured; labels [s, b], `logits` as the model gave them.

        arguments: as for `validity_calibrated_kl`, but for `inplace_gradient`.
        """
        if self._states is None:
            raise ValueError(
                "fused_head: expected the model to run its output_layer before its loss, it did not"
            )
        weight = self._weight
        self._probe.check(logits, weight)
        out = fused_validity_calibrated_kl(
            self._states,
            weight,
            teacher_logits,
            labels,
            scale=self._scale,
            softcap=self._softcap,
            sequence_parallel=self._gather,
            accumulate_main_grad=bool(getattr(self._layer, "gradient_accumulation_fusion", False))
            and weight.requires_grad,
            **self._of_upstream(),
            **arguments,
        )
        return out._replace(loss=_WithLogits.apply(out.loss, logits))

    def _of_upstream(self) -> dict[str, Any]:
        if not torch.is_grad_enabled():
            return {}
        if self._even is False:
            return {"gradient_in_forward": False}
        if self._found_uneven is None:
            self._found_uneven = torch.zeros(1, device=self._weight.device)
        self._trusted = self._even is True and self._looking_waits()
        return {"even_upstream": self._trusted, "found_uneven": self._found_uneven}

    def _looking_waits(self) -> bool:
        return self._weight.is_cuda

    def end_step(self) -> None:
        """After the step's last backward; waits for the device, as Megatron does before its optimizer.

        ValueError where loss_func weighed the tokens of a micro-batch alike in the first step and does so no more: the
        gradient of the output layer is NaN then. And where the model makes its logits otherwise than it did.
        """
        self._probe.read()
        found, self._found_uneven = self._found_uneven, None
        if found is None:
            return
        uneven = bool(found)
        if self._even is None:
            self._even = not uneven
        elif uneven and self._trusted:
            raise ValueError(
                "fused_head: expected loss_func to give all tokens of a micro-batch that count the same factor, up to "
                "the loss mask, as in the first step, got factors that differ; set fused_head recompute"
            )


class _ForTheLossAlone(torch.autograd.Function):
    """What stands in the place of the logits: nobody learns from it, and whoever tries is told so in backward."""

    @staticmethod
    def forward(ctx, logits, followed):
        ctx.set_materialize_grads(False)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        # Zeros are what a function on the way, a soft-cap of its own kind, makes of no gradient.
        if gradient is not None and gradient.any():
            raise RuntimeError(
                "fused_head: expected nothing but the loss to learn from the model's logits, got another term of them "
                "in the model's code; set fused_head off"
            )
        return None, None


class _WithLogits(torch.autograd.Function):
    """The loss, with the model's logits beside it, so that a term which rides on them has its backward too."""

    @staticmethod
    def forward(ctx, loss, logits):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _check_compatibility(chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None) -> None:
    layer, config = getattr(chunk, "output_layer", None), chunk.config
    if layer is None:
        raise ValueError(f"fused_head: expected a model with an output_layer, got {type(chunk).__name__}")
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(
            "fused_head: expected a model without multi-token prediction, whose heads run the output layer themselves, "
            f"got mtp_num_layers {config.mtp_num_layers}"
        )
    refuse_other_output_layer(config, "fused_head")
    if getattr(layer, "bias", None) is not None:
        raise ValueError("fused_head: expected an output layer without a bias, got one with a bias")
    if tensor_group is not None and getattr(layer, "gather_output", False):
        raise ValueError("fused_head: expected parallel_output True, got a model that gathers its logits")
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise ValueError("fused_head: expected defer_embedding_wgrad_compute False, got True")
    if getattr(config, "cross_entropy_fusion_impl", None) == "linear":
        raise ValueError("fused_head: expected another cross_entropy_fusion_impl, got 'linear'")
    weight = layer.weight
    if weight is not None and weight.dtype not in TOLERANCES:
        raise ValueError(f"fused_head: expected a weight of float32, bfloat16 or float16, got {weight.dtype}")
    # torch's FSDP makes it a DTensor, which has a mesh.
    if weight is not None and (hasattr(weight, "__fsdp_param__") or hasattr(weight, "device_mesh")):
        raise ValueError(
            "fused_head: expected Megatron's own data parallelism, got a weight that FSDP has cut"
        )
