"""The most probable tokens of a vocabulary that is split over the teacher's tensor ranks, and the mass of the rest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Shard

# Logits per float32 block, so that no float32 copy of all of them is ever made; on the CPU one that its cache holds.
_BLOCK_ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 18}
_GROUP = 32  # neighbouring columns that are looked at only if their largest logit is among the k largest of all groups
_NO_KEY = -(1 << 63)  # behind the key of every logit, -inf and NaN included
_LOW = (1 << 32) - 1


def top_k_of(
    logits: Tensor, k: int, shard: Shard, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [s, b, k] float32, tokens [s, b, k] int32, and the log of all other mass [s, b] float32.

    logits: [s, b, shard.width], this rank's true columns. k: from 1 to the whole vocabulary. The same result on every
    rank of `group`, in descending order. Of equal logits the smaller token comes first, also where not all of them have
    a place: the choice depends on no layout and on no device.

    Error: at most some 1e-6 (1 + d) nat, with d the distance of a token's logit from the row's largest. So is that of
    the tail, whose mass is summed over the tail itself: it keeps its digits where the k tokens hold nearly everything.
    The tail is -inf where the k tokens hold the whole vocabulary. Rounding makes no token equal to a better first one,
    so that the first is known to be the teacher's best.

    A row with a NaN or +inf, or with no finite logit, has no distribution: NaN stands among its log-probabilities, and
    its tokens are k different ones of the vocabulary all the same.

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
    # One column more than there are, for what other shards hold.
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
        # Each of the k best stands in one of the k groups with the largest keys: a group before its own holds a better.
        grouped = block[:, : groups * _GROUP].unflatten(-1, (groups, _GROUP)).amax(-1)
        found = _LOW - (_keys(grouped, columns[:groups]).topk(k, dim=-1).values & _LOW)
        within = (found[..., None] * _GROUP + columns[:_GROUP]).flatten(-2)
        columns = torch.cat([within, columns[groups * _GROUP :].expand(block.shape[0], -1)], -1)
        block = block.gather(-1, columns)
    return _keys(block, columns + shard.start).topk(k, dim=-1).values


def _keys(block: Tensor, tokens: Tensor) -> Tensor:
    """An integer per float32 logit, larger for the larger logit, and for the smaller token where logits are equal.

    The upper half is the logit: a float's bits ascend with it, once those of the negative ones are turned around. NaN
    comes before or behind all numbers, as its sign bit says. The lower half is the token, counted backwards.
    """
    bits = (block + 0.0).view(torch.int32).long()  # + 0.0: of the two zeros none is the larger
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) + (_LOW - tokens)


def _logits_of(keys: Tensor) -> Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def _log_rest(block: Tensor, chosen: Tensor, top: Tensor, shard: Shard, scratch: Tensor) -> Tensor:
    """The log of the sum of exp(logit - top) over this shard's columns that are not among the chosen tokens."""
    width = block.shape[-1]
    columns = chosen - shard.start
    columns = torch.where((columns >= 0) & (columns < width), columns, width)
    distance = scratch[: block.shape[0]]
    torch.sub(block, top, out=distance[:, :width])
    distance[:, width:] = -torch.inf
    # Where several entries of a row point at one column, all of them write -inf: their order does not matter.
    return distance.scatter_(-1, columns, -torch.inf).logsumexp(-1)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...], the same everywhere."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
