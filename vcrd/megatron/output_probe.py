"""Whether a model makes its logits as it is said to, asked with hidden states that are made for the question.

What the first micro-batch holds must not decide: a soft-cap in the model's own code changes nothing while logits are
small, and a factor of 1.04 nothing that rounding to bfloat16 could not do to a sum of thousands of products. So one
pass in `EVERY`, the first among them, gets other hidden states before its output layer, and the logits that the model
makes of these are compared with what they should be:

- zeros, whose logits are 0: a bias shows;
- one unit at a power of two, all others 0, from 1 to 4096: each logit is one product, which no dtype rounds, so that a
  factor and another weight show, and a soft-cap on the large ones;
- all units different: what a layer does to its input as a whole shows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

EVERY = 16  # passes: 16 rows among those of 16 micro-batches are less than 1 in 1000
_ROWS = 16  # hidden states at least, of four kinds
_UNITS = 5  # powers of 8, from 1 on
# Of a logit and its row's root mean square, in the coarsest dtype of states, weight and logits. A scale and a soft-cap
# round five times, which was measured to make two thirds of this in bfloat16. TF32 may multiply float32.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3 * 2.0**-8, torch.float16: 2.0**-9}
_NATS = 1e-3  # by which any logit may differ
_LARGEST = 1024.0  # no model trains on larger logits
_LARGEST_PRODUCT = 32768.0  # float16 ends at twice as much
_GOLDEN = 0.6180339887498949  # multiples modulo 1 spread evenly


class OutputProbe:
    """Passes are counted alike on every tensor rank, and a question is deterministic: ranks agree without a word.

    argument, advice: how the sentence of the ValueError begins and ends.
    """

    def __init__(
        self,
        scale: float,
        softcap: float | None,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        argument: str,
        advice: str,
    ) -> None:
        self.due = False  # whether this pass is one of those that are asked
        self._scale, self._softcap = scale, softcap
        self._group = group
        self._parts = group.size() if sequence_parallel and group is not None else 1
        self._sentence = argument, advice
        self._passes = 0
        self._asked: Tensor | None = None  # [positions, b, size], the same on every rank
        self._worst: Tensor | None = None  # of what was compared and nobody has read, on the device

    def begin(self) -> None:
        """Before each pass of the model."""
        self.due = self._passes % EVERY == 0
        self._passes += 1
        self._asked = None

    def states(self, like: Tensor) -> Tensor:
        """What the output layer multiplies in the place of `like` [s, b, size]: this rank's positions, at least one."""
        positions = -(-_ROWS // (like.shape[1] * self._parts)) * self._parts
        rows, size = positions * like.shape[1], like.shape[-1]
        with torch.device(like.device):
            asked = _questions(rows, size, self._passes // EVERY * rows)
        self._asked = asked.view(positions, *like.shape[1:]).to(like.dtype)
        return self._asked if self._parts == 1 else self._asked.chunk(self._parts)[self._group.rank()]

    @torch.no_grad()
    def check(self, logits: Tensor, weight: Tensor) -> None:
        """Compares what the model made of `states`, [positions, b, width]; weight [width, size].

        ValueError, on every tensor rank alike, at once where the pass is the first or nothing waits for a device; later
        and on a GPU, `read` raises it. Collectives, where states were asked: one all-reduce of one float32.
        """
        if self._asked is None:
            return
        asked, self._asked = self._asked, None
        worst = self._difference(asked, logits, weight)
        if self._group is not None:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._group)
        self._worst = worst if self._worst is None else torch.maximum(worst, self._worst)
        if self._passes == 1 or worst.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """ValueError where logits were other ones. Waits for the device if any were compared since it was called."""
        worst, self._worst = self._worst, None
        if worst is not None and not float(worst) <= 1:
            argument, advice = self._sentence
            cap = "not soft-capped" if self._softcap is None else f"soft-capped at {self._softcap:g}"
            raise ValueError(
                f"{argument} scale * states @ weight.T, soft-capped or not, by its configuration with scale "
                f"{self._scale:g} and {cap}, got logits of test states that differ by {float(worst):.3g} times what "
                f"rounding may do (a soft-cap, factor, bias or adapter that the configuration does not name); {advice}"
            )

    def _difference(self, asked: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """The largest difference as a multiple of what is allowed."""
        if logits.shape != (*asked.shape[:-1], weight.shape[0]):
            return torch.full((), torch.inf, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            # A float32 copy of the whole weight would be more memory than any micro-batch needs.
            product = torch.cat([asked.float() @ part.float().T for part in weight.split(4096)], -1)
        linear = self._scale * product
        # A NaN of the weight's is not this layer's doing.
        counted = (linear.abs() <= _LARGEST) & (product.abs() <= _LARGEST_PRODUCT)
        expected = linear if self._softcap is None else self._softcap * torch.tanh(linear / self._softcap)
        expected = torch.where(counted, expected, 0.0)
        size = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
        tolerance = max(TOLERANCES.get(t.dtype, 0.0) for t in (asked, logits, weight))
        difference = (logits.float() - expected).abs() / (tolerance * size + _NATS)
        return torch.where(counted, difference, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def _questions(rows: int, size: int, first: int) -> Tensor:
    """float64 [rows, size]; of unit rows the unit and its power depend on `first` too."""
    row = torch.arange(rows, dtype=torch.float64)[:, None]
    unit = torch.arange(size, dtype=torch.float64)
    kind = row % _ROWS
    spread = (row * size + unit) * _GOLDEN % 1 * 2 - 1
    dense = spread * 16.0 ** (kind - 1)
    place = ((row * _GOLDEN + first * _GOLDEN % 1) % 1 * size).floor()
    single = torch.where(unit == place, 8.0 ** (kind % _UNITS), 0.0)
    return torch.where(kind == 0, 0.0, torch.where(kind <= 3, dense, single))
