"""A model's output layer: a forward without logits, and the check of what the model makes its logits of.

Two users multiply the hidden states by the layer's weight in the model's place: the loss, for a student with a fused
head (`fused_head.py`), and a student's job or ranks, for a teacher with the payload "hidden" (`serving.py`,
`colocated_teacher.py`). Both rely on logits = scale * states @ weight.T, then softcap * tanh(logits / softcap).

The values of one micro-batch cannot show that this is true: a soft-cap in the model's own code changes nothing while
logits are small, and a factor of 1.04 is within the rounding of bfloat16 for a sum of thousands of products. So one
pass in `EVERY`, the first among them, replaces the hidden states by test states before the output layer, and compares
the logits that the model makes of them with the expected ones:

- zeros have logits of 0, so a bias shows;
- one unit at a power of two from 1 to 4096, all others 0, makes each logit one product, which no dtype rounds: a factor
  and another weight show, and a soft-cap shows on the large ones;
- states whose units all differ show what a layer does to its input as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected

EVERY = 16  # passes per test: 16 rows among those of 16 micro-batches are less than 1 in 1000
_ROWS = 16  # the least number of test states, which are of four kinds
_UNITS = 5  # powers of 8, from 1 on
# Relative tolerance of a logit and of its row's root mean square, by the coarsest dtype of states, weight and logits.
# In bfloat16 a scale and a soft-cap, which round five times, use two thirds of it (measured). Float32 may use TF32.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3 * 2.0**-8, torch.float16: 2.0**-9}
_NATS = 1e-3  # absolute tolerance of any logit
_LARGEST = 1024.0  # no model trains on larger logits
_LARGEST_PRODUCT = 32768.0  # the largest float16 is twice as much
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 spread evenly
# Configuration fields in which models keep a soft-cap of their logits. Megatron-Core's own models have none.
_CAPS = ("final_logit_softcapping", "output_logit_softcapping", "logit_softcap")


@dataclass
class Captured:
    """Input of the output layer in one pass. None: the model has not called the layer.

    states: [s, b, hidden size]; with sequence parallelism this rank's part of s. weight: [v/tp, hidden size].
    """

    states: Tensor | None = None
    weight: Tensor | None = None


class OutputLayer:
    """The output layer of the last stage's chunk, with its `scale` and `softcap` (None for none).

    Tied embeddings, the scale of MuP, a soft-cap that the configuration names, and tensor and sequence parallelism are
    supported. Test states detect a model that does anything else to its logits, in its first pass and in one of 16.

    Passes are counted alike on every tensor rank and test states are deterministic, so that ranks agree without a
    collective.
    """

    def __init__(
        self, chunk: torch.nn.Module, tensor_group: dist.ProcessGroup | None, argument: str, advice: str
    ) -> None:
        """argument, advice: how an error message begins and ends. ValueError for a layer that cannot be captured."""
        layer, config = getattr(chunk, "output_layer", None), chunk.config
        if layer is None:
            raise expected(argument, "a model with an output_layer", type(chunk).__name__)
        if getattr(config, "fp8_output_proj", False):
            raise expected(
                argument,
                (
                    "fp8_output_proj False, because the product with the output layer is computed in the model's own "
                    "dtype"
                ),
                "True",
            )
        self.scale = float(config.mup_output_mult) if getattr(config, "use_mup", False) else 1.0
        cap = next((value for name in _CAPS if (value := getattr(config, name, None))), None)
        self.softcap = None if cap is None else float(cap)
        self.group = tensor_group
        self.sequence_parallel = tensor_group is not None and bool(getattr(layer, "sequence_parallel", False))
        self._chunk, self._layer = chunk, layer
        self._messages = argument, advice
        self._passes = 0
        self._due = False  # whether this pass gets test states
        self._asked: Tensor | None = (
            None  # the test states [positions, b, size], the same on every tensor rank
        )
        self._worst: Tensor | None = (
            None  # the largest difference that `raise_if_different` has not read, on the device
        )

    @property
    def weight(self) -> Tensor:
        """The parameter [vocabulary shard, hidden size]: the layer's own, or the tied embedding's."""
        if getattr(self._chunk, "share_embeddings_and_output_weights", False):
            return self._chunk.shared_embedding_or_output_weight()
        return self._layer.weight

    @contextlib.contextmanager
    def captured(self) -> Iterator[Captured]:
        """While open, the layer multiplies test states or one row of zeros; the model's output is for `check` alone.

        No method is replaced: hooks of the layer exchange its input and guard its output. The layer is still called as
        a module, because Megatron's data parallelism gathers the layer's parameters in a hook of that call
        (overlap_param_gather), and hooks of the model's own may add a term of the logits to the loss, which backward
        must see to refuse it. One row for each sample costs a reading of the weight.
        """
        captured = Captured()
        self._begin()

        def exchange(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            states, *rest = args
            weight = kwargs.get("weight", rest[0] if rest else None)
            captured.states, captured.weight = states, self.weight if weight is None else weight
            return (self._rows(states), *rest), kwargs

        def guard(layer: torch.nn.Module, args: tuple, output: tuple) -> tuple:
            logits, *bias = output
            followed = captured.states if captured.states.requires_grad else captured.weight
            return _ForTheLossAlone.apply(logits.detach(), followed, self._messages), *bias

        # The first of the forward hooks: others must see a guarded output.
        hooks = (
            self._layer.register_forward_pre_hook(exchange, with_kwargs=True),
            self._layer.register_forward_hook(guard, prepend=True),
        )
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()

    def whole(self, states: Tensor) -> Tensor:
        """[s, b, size] of this rank's part of s; with sequence parallelism one all-gather over the tensor ranks."""
        if not self.sequence_parallel:
            return states
        parts = [torch.empty_like(states) for _ in range(self.group.size())]
        dist.all_gather(parts, states.contiguous(), group=self.group)
        return torch.cat(parts)

    @torch.no_grad()
    def check(self, logits: Tensor, weight: Tensor) -> None:
        """Compares what the model made of test states, logits [positions, b, width], if this pass was given any.

        weight: [width, size], the weight of the expected logits. ValueError, on every tensor rank alike, at once
        on the CPU and in the first pass; later, on a GPU, `raise_if_different` raises it. Collectives, where the pass
        was given test states: one all-reduce of one float32 over the tensor ranks.
        """
        if self._asked is None:
            return
        asked, self._asked = self._asked, None
        worst = self._difference(asked, logits, weight)
        if self.group is not None:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group)
        self._worst = worst if self._worst is None else torch.maximum(worst, self._worst)
        if self._passes == 1 or worst.device.type == "cpu":
            self.raise_if_different()

    def raise_if_different(self) -> None:
        """ValueError if logits of test states differed. Waits for the device if there are new ones."""
        worst, self._worst = self._worst, None
        if worst is None or float(worst) <= 1:
            return
        argument, advice = self._messages
        cap = "not soft-capped" if self.softcap is None else f"soft-capped at {self.softcap:g}"
        raise expected(
            argument,
            (
                "a model whose logits are scale * states @ weight.T, soft-capped or not, by its configuration "
                f"with scale {self.scale:g} and {cap}"
            ),
            (
                f"logits of test states that differ by {float(worst):.3g} times the allowed rounding error (a "
                f"soft-cap, factor, bias or adapter that the configuration does not name); {advice}"
            ),
        )

    def _begin(self) -> None:
        self._due = self._passes % EVERY == 0
        self._passes += 1
        self._asked = None

    @torch.no_grad()
    def _rows(self, states: Tensor) -> Tensor:
        """What the layer multiplies in place of `states` [s, b, size]: this rank's test states, or zeros."""
        if not self._due:
            return states.new_zeros(1, *states.shape[1:])
        parts = self.group.size() if self.sequence_parallel else 1
        positions = -(-_ROWS // (states.shape[1] * parts)) * parts  # at least one on each rank
        rows, size = positions * states.shape[1], states.shape[-1]
        with torch.device(states.device):
            asked = _test_states(rows, size, self._passes // EVERY * rows)
        self._asked = asked.view(positions, *states.shape[1:]).to(states.dtype)
        return self._asked if parts == 1 else self._asked.chunk(parts)[self.group.rank()]

    def _difference(self, asked: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """The largest difference as a multiple of the tolerance."""
        if logits.shape != (*asked.shape[:-1], weight.shape[0]):
            return torch.full((), torch.inf, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            # By parts: a float32 copy of the whole weight would be more memory than any micro-batch needs.
            product = torch.cat([asked.float() @ part.float().T for part in weight.split(4096)], -1)
        linear = self.scale * product
        # A NaN in the weight is no error of the layer.
        counted = (linear.abs() <= _LARGEST) & (product.abs() <= _LARGEST_PRODUCT)
        expected = linear if self.softcap is None else self.softcap * torch.tanh(linear / self.softcap)
        expected = torch.where(counted, expected, 0.0)
        size = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
        tolerance = max(TOLERANCES.get(t.dtype, 0.0) for t in (asked, logits, weight))
        difference = (logits.float() - expected).abs() / (tolerance * size + _NATS)
        return torch.where(counted, difference, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf).max()


class _ForTheLossAlone(torch.autograd.Function):
    """Takes the place of the logits. Backward raises an error if anything but the loss was computed from them."""

    @staticmethod
    def forward(ctx, logits, followed, messages):
        ctx.set_materialize_grads(False)
        ctx.messages = messages
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        # A soft-cap between the layer and the loss turns an undefined gradient into zeros.
        if gradient is not None and gradient.any():
            argument, advice = ctx.messages
            raise RuntimeError(
                f"{argument}: expected nothing but the loss to learn from the model's logits, got another term of them "
                f"in the model's code; {advice}"
            )
        return None, None, None


def _test_states(rows: int, size: int, first: int) -> Tensor:
    """float64 [rows, size]. In rows of one unit, the unit depends on `first` too."""
    row = torch.arange(rows, dtype=torch.float64)[:, None]
    unit = torch.arange(size, dtype=torch.float64)
    kind = row % _ROWS
    spread = (row * size + unit) * _GOLDEN % 1 * 2 - 1
    dense = spread * 16.0 ** (kind - 1)
    place = ((row * _GOLDEN + first * _GOLDEN % 1) % 1 * size).floor()
    single = torch.where(unit == place, 8.0 ** (kind % _UNITS), 0.0)
    return torch.where(kind == 0, 0.0, torch.where(kind <= 3, dense, single))
