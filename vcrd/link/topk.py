"""The most probable tokens of a vocabulary that is split over the teacher's tensor ranks, and the mass of the rest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Shard

_BLOCK_ELEMENTS = 1 << 22  # logits per float32 block, so that no float32 copy of all of them is ever made
_NO_TOKEN = (
    1 << 40
)  # behind every token, so that a shard with fewer than k columns wins no place with its blanks


def top_k_of(
    logits: Tensor, k: int, shard: Shard, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [s, b, k] float32, tokens [s, b, k] int32, and the log of all other mass [s, b] float32.

    logits: [s, b, shard.width], this rank's true columns. k: at most the vocabulary. The same result on every rank of
    `group`, in descending order, equal ones by token. The mass of the rest is summed over the rest itself, so it keeps
    its digits where the k tokens hold nearly everything; it is -inf where they hold the whole vocabulary.

    Collectives, when `group` has more than one rank: three all-gathers, of k float32, k int64 and 1 float32 per
    position.
    """
    leading, width = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(leading.numel(), width)
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    values = rows.new_full((rows.shape[0], k), -torch.inf, dtype=torch.float32)
    tokens = torch.full((rows.shape[0], k), _NO_TOKEN, dtype=torch.int64, device=rows.device)
    kept = min(k, width)
    for first in range(0, rows.shape[0], step):
        block = slice(first, first + step)
        found = _stable_top(rows[block].float(), kept)
        values[block, :kept], tokens[block, :kept] = found[0], found[1] + shard.start
    values, tokens = _merged(values, tokens, k, group)
    rest = rows.new_empty(rows.shape[0], dtype=torch.float32)
    for first in range(0, rows.shape[0], step):
        block = slice(first, first + step)
        rest[block] = _log_rest(rows[block].float(), tokens[block], shard)
    if group is not None and group.size() > 1:
        rest = _gathered(rest, group).logsumexp(0)
    total = torch.logaddexp(values.logsumexp(-1), rest)
    return (
        (values - total[:, None]).view(*leading, k),
        tokens.int().view(*leading, k),
        (rest - total).view(leading),
    )


def _stable_top(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, equal ones by column: topk promises no order among equals."""
    values, columns = block.topk(k, dim=-1)
    return _by_value_then_token(values, columns)


def _by_value_then_token(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    order = tokens.argsort(dim=-1, stable=True)
    values, tokens = values.gather(-1, order), tokens.gather(-1, order)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(-1, order), tokens.gather(-1, order)


def _merged(values: Tensor, tokens: Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    if group is None or group.size() == 1:
        return values, tokens
    all_values, all_tokens = _gathered(values, group), _gathered(tokens, group)
    values = all_values.transpose(0, 1).flatten(1)
    tokens = all_tokens.transpose(0, 1).flatten(1)
    values, tokens = _by_value_then_token(values, tokens)
    return values[:, :k], tokens[:, :k]


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...], the same everywhere."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def _log_rest(block: Tensor, tokens: Tensor, shard: Shard) -> Tensor:
    """The log of the sum of exp over this shard's columns that are not among `tokens`; changes `block`."""
    if not block.shape[-1]:
        return block.new_full((block.shape[0],), -torch.inf)
    columns = tokens - shard.start
    mine = (columns >= 0) & (columns < shard.width)
    # Columns of other ranks point at the first chosen one of this rank, or nowhere at all.
    spare = torch.where(mine.any(-1), mine.int().argmax(-1), -1)
    columns = torch.where(mine, columns, columns.gather(-1, spare.clamp(min=0)[:, None]))
    has = mine.any(-1)
    block[has] = block[has].scatter(-1, columns[has], -torch.inf)
    return block.logsumexp(-1)
