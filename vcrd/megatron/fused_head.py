"""The student's output layer, taken out of its model for the fused head: the loss multiplies, chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.head import fused_validity_calibrated_kl
from vcrd.loss import CalibratedLoss
from vcrd.megatron.fp8 import refuse_other_output_layer
from vcrd.megatron.output_layer import TOLERANCES, scale_and_softcap
from vcrd.teacher_forms import HiddenStates, TopKLogits


class FusedHead:
    """One model's output layer: while `captured`, its forward keeps the hidden states, and `loss` starts from them.

    Tied embeddings, the scale of MuP, a soft-cap, sequence parallelism, tensor parallelism and fused gradient
    accumulation are honoured. A model that does anything else to its logits is found out with the first micro-batch:
    it is given those of its first position to finish, and they are compared.

    What the script's loss_func makes of the losses per token is seen in the first step, by waiting for the device in
    each backward: the same factor for all tokens that count, as Megatron's masked sum, or each its own. On a GPU no
    later backward waits, and `end_step` says whether it went on like that; on CPU, where nothing waits, each looks.

    recompute: see `DistillSettings.fused_head_recompute`.
    """

    def __init__(
        self, chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None, recompute: bool = False
    ) -> None:
        _refuse_what_clashes(chunk, tensor_group)
        self._layer = chunk.output_layer
        self._group = tensor_group
        self._scale, self._softcap = scale_and_softcap(chunk.config)
        self._gather = tensor_group is not None and bool(getattr(self._layer, "sequence_parallel", False))
        self._checked = False
        # Whether the upstream gradient of the losses is even, as of the first step; None before its end.
        self._even = False if recompute else None
        self._trusted = False  # whether backward goes by it without looking
        self._found_uneven: Tensor | None = None  # of this step's micro-batches, on the device
        self._states: Tensor | None = None
        self._weight: Tensor | None = None

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """While open, the model makes no logits: what it hands to its loss in their place is for `loss` alone."""
        plain = self._layer.forward
        own = vars(self._layer).get("forward")  # where someone has replaced it before

        def capture(input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> tuple:
            self._states, self._weight = input_, self._layer.weight if weight is None else weight
            if self._checked:
                return input_.detach()[..., :1], None
            with torch.no_grad():
                return plain(input_.detach()[:1], weight, *args, **kwargs)

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
        self._check(logits)
        weight = self._weight
        return fused_validity_calibrated_kl(
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
        gradient of the output layer is NaN then.
        """
        found, self._found_uneven = self._found_uneven, None
        if found is None:
            return
        uneven = bool(found)
        if self._even is None:
            self._even = not uneven
        elif uneven and self._trusted:
            raise ValueError(
                "fused_head: expected loss_func to give all tokens of a micro-batch that count the same factor, up to "
                "the loss mask, as in the first step, got factors that differ; set fused_head_recompute"
            )

    @torch.no_grad()
    def _check(self, logits: Tensor) -> None:
        """ValueError, on every tensor rank alike, if the model's logits [1 or ranks, b, width] are not those of `loss`.

        Collectives, the first time: one all-reduce of one float32; with sequence parallelism one all-gather more.
        """
        if self._checked:
            return
        self._checked = True
        states = self._states[:1]
        if self._gather:
            parts = [torch.empty_like(states) for _ in range(self._group.size())]
            dist.all_gather(parts, states.contiguous(), group=self._group)
            states = torch.cat(parts)
        expected = self._scale * (states.float() @ self._weight.float().T)
        if self._softcap is not None:
            expected = self._softcap * torch.tanh(expected / self._softcap)
        if logits.shape == expected.shape:
            worst = (logits.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        else:
            worst = expected.new_full((), torch.inf)
        if self._group is not None:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._group)
        if not worst <= TOLERANCES[self._weight.dtype]:
            raise ValueError(
                "fused_head: expected a model whose logits are scale * states @ weight.T, soft-capped or not, "
                f"got logits that differ by {float(worst):.3g} of the largest"
            )


def _refuse_what_clashes(chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None) -> None:
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
