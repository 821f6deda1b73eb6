"""The payloads: the forms in which the answers of the teacher travel. Tensors in, tensors out; the only collectives are
those of `row_max` and `top_k_of`.

`float32` and `float16` carry the logits. `float32` is bit-exact. `float16` carries each logit minus the maximum of its
row over the whole vocabulary. These distances are small where the probability is large, so two bytes lose 200 times
less than logits in bf16. With d the distance from the maximum in float32, |error| <= max(2**-11 * d, 2**-25) for
d <= 65504. Larger distances arrive as -65504, and -inf too. A softmax does not depend on a shift of the whole row, so
the distances serve as logits. A row that is no distribution (it has NaN or +inf, or only -inf) arrives as NaN.

`logits_8bit` carries the square root of that distance in one byte: 255 sqrt(min(d, 24) / 24), rounded. The weight
exp(-d) tolerates errors that grow with d: |error of d| <= 0.0193 sqrt(d) + 1e-4 for d <= 24, and larger distances
arrive as 24. The student gets uint8 codes, which the loss decodes in registers. A row that is no distribution arrives
with the code 255 in every column. In any other row the largest logit has the code 0.

`topk` carries the k largest log-probabilities with their tokens, and the logarithm of the total mass of all other
tokens. Each has an error of about 1e-6 (1 + d) (see `top_k_of`). How that mass is distributed is lost.

`hidden` carries the last hidden states of the teacher, bit-exact in the dtype that its `Head` states. The student
computes the logits with the output layer of the teacher in float32, so there is no rounding of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected

from .plan import Shard

# Logits per float32 block: there is never a float32 copy of all logits. On the CPU a block fits into the cache.
_BLOCK_ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 18}
_GROUP = (
    32  # neighbouring columns: read again only if their largest logit is among the k largest of all groups
)
_NO_KEY = -(1 << 63)  # below the key of every logit, also of -inf and NaN
_LOW = (1 << 32) - 1
Empty = Callable[..., Tensor]  # called as torch.empty(*shape, dtype=...): provides memory


@dataclass(frozen=True)
class Payload:
    """One payload: its name in the settings, its code in headers, its size in bytes.

    dtype: the dtype of the elements, one per column; None for payloads that do not depend on the columns (`whole`).
    relative: whether the elements are relative to the row maximum. top_k, state_size, state_dtype: what the size of a
    whole payload depends on; `sized` sets them.
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
        """Uninitialised tensors from `empty` for that many positions and columns, in the order of the message."""
        if self.dtype is not None:
            shapes = [((width,), self.dtype)]
        elif self.name == "topk":
            shapes = [((self.top_k,), torch.float32), ((self.top_k,), torch.int32), ((), torch.float32)]
        else:
            shapes = [((self.state_size,), self.state_dtype)]
        return [empty(sequence, batch, *shape, dtype=dtype) for shape, dtype in shapes]

    def bytes(self, tokens: int, width: int) -> int:
        """The bytes of a piece of that many positions and columns, without its header."""
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
    raise expected("payload", f"one of {', '.join(p.name for p in PAYLOADS)}", repr(name))


def check_output(payload: Payload, output: Tensor, batch: int, sequence: int, width: int) -> None:
    """ValueError unless this is what a rank of the last stage has to answer with: logits [s, b, width] of any float
    dtype, or hidden states [s, b, size]."""
    name = "logits"
    if payload.name == "hidden":
        name, width = "states", payload.state_size
    if output.shape != (sequence, batch, width) or not output.dtype.is_floating_point:
        got = f"{output.dtype} {list(output.shape)}"
        raise expected(name, f"a float tensor {[sequence, batch, width]}", got)


def whole_rows(
    payload: Payload, output: Tensor, shard: Shard, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], Tensor | None]:
    """The tensors of an answer before they are cut into pieces and encoded, and the row maxima that `encode` needs.

    output: of a rank of the last stage: logits [s, b, padded columns], or hidden states [s, b, size], of which nothing
    is cut away. shard: the true columns of this rank. Collectives over `group`: those of `row_max` or `top_k_of`.
    """
    if payload.name == "hidden":
        return [output], None
    logits = output[..., : shard.width]
    if payload.name == "topk":
        return list(top_k_of(logits, payload.top_k, shard, group)), None
    return [logits], row_max(logits, group) if payload.relative else None


def row_max(logits: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The maximum of each row of [..., columns] over all ranks of `group`: [..., 1] float32, finite or NaN.

    NaN on every rank for a row that is no distribution: it has NaN or +inf, or only -inf. Relative to NaN, the whole
    row is encoded as NaN or as the code 255, so the student recognizes it. `logits` has true columns only, possibly
    none. Collectives: one all-reduce of one float32 per row when `group` has more than one rank.
    """
    if logits.shape[-1]:
        top = logits.amax(-1, keepdim=True).float()
    else:
        top = logits.new_full((*logits.shape[:-1], 1), -torch.inf, dtype=torch.float32)
    if group is not None and group.size() > 1:
        # A maximum with NaN depends on the backend. Infinities do not.
        top = top.masked_fill(top.isnan(), torch.inf)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    return top.masked_fill(top.isinf(), torch.nan)


def encode(payload: Payload, output: Tensor, top: Tensor | None = None, empty: Empty = torch.empty) -> Tensor:
    """Encodes the columns of one piece, [s, b, width] of any float dtype, or hidden states [s, b, size], into a new
    contiguous tensor on the same device.

    top: [s, b, 1], the `row_max` over the whole vocabulary; only for relative payloads. empty: provides the memory of a
    result on the CPU. The result never shares memory with `output`.
    """
    if payload.relative and top is None:
        raise expected("top", f"the row maxima for the relative payload {payload.name!r}", "None")
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


def top_k_of(
    logits: Tensor, k: int, shard: Shard, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [s, b, k] float32, tokens [s, b, k] int32, and the log of all other mass [s, b] float32.

    logits: [s, b, shard.width], the true columns of this rank. k: from 1 to the size of the vocabulary. The result is
    the same on every rank of `group`, in descending order. Of equal logits the smaller token comes first, also at the
    end of the k. So the choice depends neither on the layout nor on the device.

    Error: at most about 1e-6 (1 + d) nat, with d the distance of the logit of a token from the largest one of its row.
    The tail has the same error, because its mass is summed over the tail itself: it stays exact where the k tokens have
    nearly all of the mass. The tail is -inf where the k tokens are the whole vocabulary. Rounding never makes another
    log-probability equal to the first one, so the first token is the best one of the teacher.

    A row with NaN or +inf, or without a finite logit, is no distribution: it has a NaN among its log-probabilities. Its
    tokens are nevertheless k different tokens of the vocabulary.

    Collectives, when `group` has more than one rank: two all-gathers, of k int64 and 1 float32 per position.
    """
    leading, width = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(leading.numel(), width)
    step = max(1, _BLOCK_ELEMENTS.get(rows.device.type, 1 << 22) // max(1, width))
    keys = torch.full((rows.shape[0], k), _NO_KEY, dtype=torch.int64, device=rows.device)
    kept = min(k, width)
    for first in range(0, rows.shape[0], step):
        block = slice(first, first + step)
        keys[block, :kept] = _best(rows[block].float(), kept, shard)
    if group is not None and group.size() > 1:
        keys = _gathered(keys, group).transpose(0, 1).flatten(1).topk(k, dim=-1).values
    values, tokens = _logits_of(keys), _LOW - (keys & _LOW)
    limits = torch.finfo(torch.float32)
    top = values[:, :1].clamp(limits.min, limits.max)  # finite, against "-inf minus -inf"
    rest = rows.new_empty(rows.shape[0], dtype=torch.float32)
    # One extra column, for tokens of other shards.
    scratch = rows.new_empty(min(step, rows.shape[0]), width + 1, dtype=torch.float32)
    for first in range(0, rows.shape[0], step):
        block = slice(first, first + step)
        rest[block] = _log_rest(rows[block].float(), tokens[block], top[block], shard, scratch)
    if group is not None and group.size() > 1:
        rest = _gathered(rest, group).logsumexp(0)
    values = values - top
    total = torch.logaddexp(values.logsumexp(-1), rest)
    logprobs = values - total[:, None]
    best = logprobs[:, :1]
    below_best = torch.nextafter(best, torch.full_like(best, -torch.inf))
    logprobs = torch.where((values < 0) & (logprobs == best), below_best, logprobs)
    return (
        logprobs.view(*leading, k),
        tokens.int().view(*leading, k),
        (rest - total).view(leading),
    )


def _best(block: Tensor, k: int, shard: Shard) -> Tensor:
    """The k largest keys of each row, in descending order."""
    width = block.shape[-1]
    groups = width // _GROUP
    columns = torch.arange(width, device=block.device)
    if groups > 2 * k:
        # Each of the k best is in one of the k groups with the largest keys: any group before its own has a better one.
        grouped = block[:, : groups * _GROUP].unflatten(-1, (groups, _GROUP)).amax(-1)
        found = _LOW - (_keys(grouped, columns[:groups]).topk(k, dim=-1).values & _LOW)
        within = (found[..., None] * _GROUP + columns[:_GROUP]).flatten(-2)
        columns = torch.cat([within, columns[groups * _GROUP :].expand(block.shape[0], -1)], -1)
        block = block.gather(-1, columns)
    return _keys(block, columns + shard.start).topk(k, dim=-1).values


def _keys(block: Tensor, tokens: Tensor) -> Tensor:
    """An integer per float32 logit, larger for the larger logit, and for the smaller token where logits are equal.

    The upper half is the logit: the bits of a float ascend with it, once those of negative floats are inverted. NaN
    comes before or after all numbers, depending on its sign bit. The lower half is the token, counted backwards.
    """
    bits = (block + 0.0).view(torch.int32).long()  # + 0.0 makes the two zeros equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) + (_LOW - tokens)


def _logits_of(keys: Tensor) -> Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def _log_rest(block: Tensor, chosen: Tensor, top: Tensor, shard: Shard, scratch: Tensor) -> Tensor:
    """The log of the sum of exp(logit - top) over the columns of this shard that are not among the chosen tokens."""
    width = block.shape[-1]
    columns = chosen - shard.start
    columns = torch.where((columns >= 0) & (columns < width), columns, width)
    distance = scratch[: block.shape[0]]
    torch.sub(block, top, out=distance[:, :width])
    distance[:, width:] = -torch.inf
    # Several entries of a row may point at one column. All of them write -inf, so their order does not matter.
    return distance.scatter_(-1, columns, -torch.inf).logsumexp(-1)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, [ranks, ...], on every rank."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
