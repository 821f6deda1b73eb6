"""What a job states when it joins the link: its tokenizer and, if it is the teacher, its weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from vcrd.errors import expected, wrong_type
from vcrd.link.handshake import LONGEST_NAME, Tokenizer
from vcrd.megatron.layout import Groups, plain_copy
from vcrd.megatron.training_loop import TrainingLoop, training_loop

_log = logging.getLogger("vcrd")
_BLOCK = 1 << 22  # elements that are mixed at once, with some 100 MB of int64 temporaries
_MODULUS = 1 << 62
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
# Odd numbers with well mixed bits: the constants of splitmix64, as signed integers.
_FACTORS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def tokenizer_of(tokenizer: Any = None, loop: TrainingLoop | None = None) -> Tokenizer | None:
    """The statement of a tokenizer: Megatron's, Hugging Face's, or any with a `vocab_size` and maybe a vocabulary.

    tokenizer: None for that of the training loop, if there is one. loop: default `training_loop()`. Returns None if
    there is no tokenizer. TypeError for an object that is none.
    """
    given = tokenizer is not None
    if not given:
        loop = training_loop() if loop is None else loop
        tokenizer = None if loop is None else loop.tokenizer
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    # Megatron's classes hold a tokenizer of a library, whose class name says more.
    inner = getattr(tokenizer, "_tokenizer", None) if hasattr(tokenizer, "library") else None
    kind = type(tokenizer if inner is None else inner).__name__.lstrip("_")[:LONGEST_NAME]
    vocabulary = _vocabulary(tokenizer)
    size = len(vocabulary) if vocabulary else getattr(tokenizer, "vocab_size", None)
    if isinstance(size, bool) or not isinstance(size, int):
        if not given:
            return None
        raise wrong_type("tokenizer", "a tokenizer with a vocab_size or a vocabulary", tokenizer)
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest() if vocabulary else ""
    return Tokenizer(kind, size, digest)


def _vocabulary(tokenizer: Any) -> list[tuple[int, str]]:
    """Ids and their tokens in the order of the ids; empty if the tokenizer has no such list."""
    for name in ("get_vocab", "vocab", "inv_vocab"):
        try:
            found = getattr(tokenizer, name)
            found = found() if callable(found) else found
            if isinstance(found, (list, tuple)):
                found = dict(enumerate(found))
            # The keys are ids, or tokens.
            pairs = [(k, v) if isinstance(k, int) else (v, k) for k, v in found.items()]
            return sorted((int(number), _text(token)) for number, token in pairs)
        except Exception as error:  # Megatron's NullTokenizer raises; others may do anything
            _log.debug("the tokenizer's %s gives no vocabulary: %r", name, error)
    return []


def _text(token: Any) -> str:
    return token.decode("latin-1") if isinstance(token, bytes) else str(token)


def weights_of(chunk: torch.nn.Module, vocab_size: int) -> int:
    """This rank's share of a digest of the model's weights: `TeacherLink.connect` adds the shares up.

    The sum depends on every bit of every weight and on its place in the whole model, by the distributed checkpoint. It
    does not depend on tensor or pipeline parallelism. Rows of the vocabulary from `vocab_size` on are padding and not
    counted. Takes one pass over the weights and waits for the device once. ValueError for a model without a
    distributed checkpoint.
    """
    try:
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": Groups.of(chunk).data_context})
        parts = list(_sharded(state))
    except Exception as error:  # another model's code may raise anything
        raise expected("model", "a sharded_state_dict", f"{error!r:.300}") from None
    total = None
    for part in parts:
        # Replicas on other pipeline or tensor ranks are not counted; the last entry is the data-parallel rank.
        copy = part.replica_id if isinstance(part.replica_id, int) else any(part.replica_id[:-1])
        if copy or part.data is None:
            continue
        share = _mixed(part, vocab_size)
        total = share if total is None else total + share
    return 0 if total is None else int(total) % _MODULUS


def _sharded(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    if isinstance(state, ShardedTensorFactory):
        state = state.build()
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):  # the rest are objects, such as the extra state of FP8
        for value in state.values():
            yield from _sharded(value)


@torch.no_grad()
def _mixed(part: ShardedTensor, vocab_size: int) -> Tensor:
    """int64 modulo 2^64: the sum over elements of a mix of their bits and their place in the whole tensor."""
    data, before = part.data.detach(), part.prepend_axis_num
    if type(data) not in (Tensor, torch.nn.Parameter):  # FP8 weights are kept in a class of their own
        data = plain_copy(data)
    strides = [1]
    for size in reversed(part.global_shape[1:]):
        strides.insert(0, strides[0] * size)
    start = int.from_bytes(hashlib.sha256(part.key.encode()).digest()[:6], "little")
    start += sum(o * s for o, s in zip(part.global_offset[:before], strides[:before], strict=True))
    offsets, strides = part.global_offset[before:], strides[before:]
    if not data.dim():
        data, offsets, strides = data.view(1), (0,), (1,)
    if part.allow_shape_mismatch and not before:  # rows of the vocabulary
        data = data[: max(0, vocab_size - offsets[0])]
    places = torch.full((), start, dtype=torch.int64, device=data.device)
    for axis, (offset, stride) in enumerate(zip(offsets, strides, strict=True)):
        if axis:
            own = (torch.arange(data.shape[axis], device=data.device) + offset) * stride
            places = places + own.view(-1, *[1] * (data.dim() - axis - 1))
    rows = max(1, _BLOCK // max(1, data[0].numel())) if len(data) else 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, len(data), rows):
        block = data[first : first + rows].contiguous()
        numbers = torch.arange(first, first + len(block), device=data.device) + offsets[0]
        place = numbers.view(-1, *[1] * (data.dim() - 1)) * strides[0] + places
        bits = block.view(_BITS[block.element_size()]).long()
        mixed = place * _FACTORS[0] + bits * _FACTORS[1]
        mixed = (mixed ^ (mixed >> 30)) * _FACTORS[2]
        mixed = (mixed ^ (mixed >> 27)) * _FACTORS[1]
        total += (mixed ^ (mixed >> 31)).sum()
    return total
