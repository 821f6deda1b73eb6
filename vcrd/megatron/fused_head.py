"""The student's loss with a fused head: the loss multiplies by the output layer, chunk by chunk, not the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss.api import CalibratedLoss
from vcrd.loss.config import HeadConfig
from vcrd.loss.fused_head import fused_validity_calibrated_kl
from vcrd.megatron.output_layer import TOLERANCES, Captured, OutputLayer
from vcrd.teacher_logits import TeacherLogits


class FusedHeadLoss:
    """While `captured`, the model makes no logits; `loss` starts from the hidden states before its output layer.

    Fused gradient accumulation, and what `OutputLayer` supports, are honoured. A model that trains on another term of
    its logits raises an error in backward.

    In the first step each backward waits for the device to see what the script's loss_func makes of the losses per
    token: one factor for all tokens that count, as Megatron's masked sum, or a factor for each. On a GPU no later
    backward waits, and `end_step` raises an error if the loss_func has changed. On the CPU each backward looks.

    recompute: whether the setting `fused_head` is "recompute".
    """

    def __init__(
        self, chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None, recompute: bool = False
    ) -> None:
        self._output = OutputLayer(chunk, tensor_group, "fused_head", "set fused_head off")
        self._layer = chunk.output_layer
        _check_compatibility(chunk, tensor_group)
        self._captured = Captured()
        # Whether the upstream gradient of the losses was even in the first step; None before the end of that step.
        self._even = False if recompute else None
        self._trusted = False  # whether backward relies on it without looking
        self._found_uneven: Tensor | None = None  # over the micro-batches of this step, on the device

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """While open, what the model's output layer returns in place of logits is for `loss` alone."""
        with self._output.captured() as self._captured:
            try:
                yield
            finally:
                self._captured = Captured()

    def loss(
        self,
        logits: Tensor,
        teacher_logits: TeacherLogits,
        labels: Tensor,
        **arguments: Any,
    ) -> CalibratedLoss:
        """`validity_calibrated_kl` of the captured hidden states; labels [s, b], `logits` as the model passed them.

        arguments: as for `validity_calibrated_kl`.
        """
        states, weight = self._captured.states, self._captured.weight
        if states is None:
            raise expected("fused_head", "a model that calls its output_layer before its loss", "none")
        self._output.check(logits, weight)
        out = fused_validity_calibrated_kl(
            states,
            weight,
            teacher_logits,
            labels,
            head=self._head_config(weight),
            **arguments,
        )
        return out._replace(loss=_WithLogits.apply(out.loss, logits))

    def _head_config(self, weight: Tensor) -> HeadConfig:
        upstream, found_uneven = "look", None
        if self._even is False:
            upstream = "uneven"
        elif torch.is_grad_enabled():
            if self._found_uneven is None:
                self._found_uneven = torch.zeros(1, device=weight.device)
            self._trusted = self._even is True and self._looking_waits(weight)
            upstream, found_uneven = "even" if self._trusted else "look", self._found_uneven
        fused = bool(getattr(self._layer, "gradient_accumulation_fusion", False))
        return HeadConfig(
            scale=self._output.scale,
            softcap=self._output.softcap,
            sequence_parallel=self._output.sequence_parallel,
            accumulate_main_grad=fused and weight.requires_grad,
            upstream=upstream,
            found_uneven=found_uneven,
        )

    def _looking_waits(self, weight: Tensor) -> bool:
        return weight.is_cuda

    def end_step(self) -> None:
        """After the last backward of the step. Waits for the device, as Megatron does before its optimizer.

        ValueError if loss_func gave all tokens of a micro-batch one factor in the first step and no longer does: the
        gradient of the output layer is NaN then. ValueError as of `OutputLayer.raise_if_different`.
        """
        self._output.raise_if_different()
        found, self._found_uneven = self._found_uneven, None
        if found is None:
            return
        uneven = bool(found)
        if self._even is None:
            self._even = not uneven
        elif uneven and self._trusted:
            raise expected(
                "fused_head",
                (
                    "loss_func to give all tokens of a micro-batch that count the same factor, up to the loss mask, "
                    "as in the first step"
                ),
                "factors that differ; set fused_head recompute",
            )


class _WithLogits(torch.autograd.Function):
    """The loss, connected to the model's logits, so that backward also reaches a term that was attached to them."""

    @staticmethod
    def forward(ctx, loss, logits):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _check_compatibility(chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None) -> None:
    layer, config = chunk.output_layer, chunk.config
    if getattr(config, "mtp_num_layers", None):
        raise expected(
            "fused_head",
            "a model without multi-token prediction, whose heads run the output layer themselves",
            f"mtp_num_layers {config.mtp_num_layers}",
        )
    if getattr(layer, "bias", None) is not None:
        raise expected("fused_head", "an output layer without a bias", "one with a bias")
    if tensor_group is not None and getattr(layer, "gather_output", False):
        raise expected("fused_head", "parallel_output True", "a model that gathers its logits")
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise expected("fused_head", "defer_embedding_wgrad_compute False", "True")
    if getattr(config, "cross_entropy_fusion_impl", None) == "linear":
        raise expected("fused_head", "another cross_entropy_fusion_impl", "'linear'")
    weight = layer.weight
    if weight is not None and weight.dtype not in TOLERANCES:
        raise expected("fused_head", "a weight of float32, bfloat16 or float16", weight.dtype)
    # torch's FSDP turns the weight into a DTensor, which has a mesh.
    if weight is not None and (hasattr(weight, "__fsdp_param__") or hasattr(weight, "device_mesh")):
        raise expected("fused_head", "Megatron's own data parallelism", "a weight sharded by FSDP")
