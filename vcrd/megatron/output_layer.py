"""The teacher's output layer, taken out of its model for the payload "hidden": states leave, logits are never made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.link.handshake import Head
from vcrd.megatron.fp8 import refuse_other_output_layer
from vcrd.megatron.output_probe import OutputProbe

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Where models that cap their logits keep the cap; Megatron-Core's own do not have one.
_CAPS = ("final_logit_softcapping", "output_logit_softcapping", "logit_softcap")


class OutputLayer:
    """The last stage's output layer: logits = scale * states @ weight.T, then softcap * tanh(logits / softcap).

    Tied embeddings, the scale of MuP and a soft-cap are honoured. A model that does anything else is found out by
    `check`, in its first pass and in one of 16 from then on (`OutputProbe`).
    """

    def __init__(self, chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None) -> None:
        layer = getattr(chunk, "output_layer", None)
        if layer is None:
            raise ValueError(
                f"model: expected an output_layer for the payload 'hidden', got {type(chunk).__name__}"
            )
        refuse_other_output_layer(chunk.config, "payload 'hidden'")
        weight = layer.weight
        if getattr(chunk, "share_embeddings_and_output_weights", False):
            weight = chunk.shared_embedding_or_output_weight()
        scale, softcap = scale_and_softcap(chunk.config)
        self._layer = layer
        self._group = tensor_group
        self._gather = bool(getattr(layer, "sequence_parallel", False))
        self._probe = OutputProbe(
            *(scale, softcap, tensor_group, self._gather),
            "model: expected logits =",
            "the payload 'hidden' sends no others, choose another payload",
        )
        # FP8 weights are kept in a class of their own: copied out, they are plain tensors of their nominal dtype.
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device).copy_(
            weight.detach()
        )
        self.head = Head(
            size=weight.shape[1],
            dtype=_DTYPES[weight.dtype],
            scale=scale,
            softcap=0.0 if softcap is None else softcap,
        )

    @contextlib.contextmanager
    def captured(self) -> Iterator[list[Tensor]]:
        """While open, a pass of the model makes no logits: the states [s, b, size] that would have become logits are
        appended to the list that is yielded. Where `check` is due the logits are those of a few states of the probe."""
        states: list[Tensor] = []
        plain, probe = self._layer.forward, self._probe
        own = vars(self._layer).get("forward")  # where someone has replaced it before
        probe.read()
        probe.begin()

        def capture(input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            states.append(self._whole(input_).detach())
            if probe.due:
                return plain(probe.states(input_), *args, **kwargs)
            return states[-1][..., :1], None

        self._layer.forward = capture
        try:
            yield states
        finally:
            del self._layer.forward
            if own is not None:
                self._layer.forward = own

    def check(self, logits: Tensor) -> None:
        """Of what the model made in the pass that was captured, [positions, b, width], if it was one to be checked.

        ValueError, on every tensor rank alike, if the model makes logits otherwise; on a GPU, where a wait would show,
        from the second check on with the next pass. Collectives, where it is due: one all-reduce of one float32 over
        the tensor ranks.
        """
        self._probe.check(logits, self.weight)

    def _whole(self, states: Tensor) -> Tensor:
        """[s, b, size]: with sequence parallelism each tensor rank comes with its part of the positions."""
        if not self._gather or self._group is None:
            return states
        parts = [torch.empty_like(states) for _ in range(self._group.size())]
        dist.all_gather(parts, states.contiguous(), group=self._group)
        return torch.cat(parts)


def scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """What a model of this configuration does with the product: the scale of MuP, and a soft-cap or None."""
    scale = float(config.mup_output_mult) if getattr(config, "use_mup", False) else 1.0
    softcap = next((c for name in _CAPS if (c := getattr(config, name, None))), None)
    return scale, None if softcap is None else float(softcap)
