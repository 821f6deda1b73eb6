"""What travels in a response. Tensors in, tensors out; no process group but the one for the row maximum.

The logits, as `float32` or `float16`. `float32` is bit-exact. `float16` carries logit minus the row's maximum over
the whole vocabulary: small where the probability is large, so that two bytes lose 200 times less than bf16 logits do.
With d the float32 distance from the maximum, |error| <= max(2**-11 * d, 2**-25) for d <= 65504; what is further
arrives as -65504, -inf too. A softmax does not see a shift per row: what arrives are logits. A row that is no
distribution (NaN, +inf, or -inf alone) arrives as NaN.

`logits_8bit` carries the square root of that distance in one byte, 255 sqrt(min(d, 24) / 24) rounded, since the weight
exp(-d) forgives errors that grow with d: |error of d| <= 0.0193 sqrt(d) + 1e-4 for d <= 24, and what is further
arrives as 24. What arrives are uint8 codes, which the loss decodes in registers. A row that is no distribution arrives
as the code 255 alone: the largest logit of any other has the code 0.

`topk` carries the k largest log-probabilities with their tokens, and the logarithm of the mass of all others: each
within some 1e-6 (1 + d) of the truth (see `topk`), but silent about how that mass is spread.

`hidden` carries the teacher's last hidden states, bit by bit those of the dtype that its `Head` states; the student
computes the logits with the teacher's output layer, in float32, so it sees no rounding of the logits at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Empty = Callable[..., Tensor]  # as torch.empty(*shape, dtype=...): where the memory comes from


@dataclass(frozen=True)
class Payload:
    """A way to carry the teacher's distribution: its name in settings, its code in headers, its bytes on the wire.

    dtype: of the elements, one a column; None for payloads that are the same for every column (`whole`). relative:
    to the row's maximum. top_k, state_size, state_dtype: what the size of a whole payload depends on; see `sized`.
    """

    name: str
    code: int
    dtype: torch.dtype | None = None
    relative: bool = False
    top_k: int = 0
    state_size: int = 0
    state_dtype: torch.dtype = torch.bfloat16

    @property
    def whole(self) -> bool:
        return self.dtype is None

    def sized(self, **sizes: Any) -> Payload:
        return replace(self, **sizes)

    def blank(self, sequence: int, batch: int, width: int, empty: Empty = torch.empty) -> list[Tensor]:
        """Uninitialised tensors of `empty` for that many positions and columns, in the order of the wire."""
        if self.dtype is not None:
            shapes = [((width,), self.dtype)]
        elif self.name == "topk":
            shapes = [((self.top_k,), torch.float32), ((self.top_k,), torch.int32), ((), torch.float32)]
        else:
            shapes = [((self.state_size,), self.state_dtype)]
        return [empty(sequence, batch, *shape, dtype=dtype) for shape, dtype in shapes]

    def bytes(self, tokens: int, width: int) -> int:
        """Of a piece of that many positions and columns on the wire, without its header."""
        if self.dtype is not None:
            return tokens * width * self.dtype.itemsize
        if self.name == "topk":
            return tokens * (8 * self.top_k + 4)
        return tokens * self.state_size * self.state_dtype.itemsize


PAYLOADS = (
    Payload("float16", 1, torch.float16, True),
    Payload("float32", 2, torch.float32),
    Payload("logits_8bit", 3, torch.uint8, True),
    Payload("topk", 4),
    Payload("hidden", 5),
)
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def payload_named(name: str) -> Payload:
    for payload in PAYLOADS:
        if payload.name == name:
            return payload
    raise ValueError(f"payload must be one of {', '.join(p.name for p in PAYLOADS)}, got {name!r}")


def row_max(logits: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The maximum of each row of [..., columns] over all ranks of `group`: [..., 1] float32, finite or NaN.

    NaN for a row that is no distribution, on every rank: one with a NaN or +inf, or with nothing above -inf. Encoded
    relative to it, all of that row is NaN, or of the code 255, which a row's largest logit otherwise never has: the
    student finds it. `logits` holds true columns only; no column at all is allowed.
    Collectives: one all-reduce of one float32 per row when `group` has more than one rank.
    """
    if logits.shape[-1]:
        top = logits.amax(-1, keepdim=True).float()
    else:
        top = logits.new_full((*logits.shape[:-1], 1), -torch.inf, dtype=torch.float32)
    if group is not None and group.size() > 1:
        # What a maximum with a NaN is depends on the backend; infinities are alike everywhere.
        top = top.masked_fill(top.isnan(), torch.inf)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    return top.masked_fill(top.isinf(), torch.nan)


def encode(payload: Payload, output: Tensor, top: Tensor | None = None, empty: Empty = torch.empty) -> Tensor:
    """The columns of one piece, [s, b, width] of any float dtype, or hidden states [s, b, size], as a new contiguous
    tensor for the wire, on the same device.

    `top` [s, b, 1] is `row_max` over the whole vocabulary; needed by relative payloads only. empty: where a result on
    the CPU lies. The result never shares memory with `output`.
    """
    if payload.relative and top is None:
        raise ValueError(f"top must be given for the relative payload {payload.name!r}, got None")
    on_cpu = output.device.type == "cpu"
    dtype = payload.dtype or payload.state_dtype
    result = empty(*output.shape, dtype=dtype) if on_cpu else output.new_empty(output.shape, dtype=dtype)
    if not payload.relative:
        return result.copy_(output)
    if output.numel():
        _encode_relative(output, top, result)
    return result


def _encode_relative(logits: Tensor, top: Tensor, result: Tensor) -> None:
    from vcrd.loss import ops  # only here, so that the link can be imported without the compiled extension

    logits = logits.float() if logits.dtype == torch.float64 else logits
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        rows = rows.contiguous()
    ops.encode(rows, top.reshape(-1).contiguous(), result.view(rows.shape))
