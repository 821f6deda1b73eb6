"""What a student receives where that is more than one tensor of logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """The k most probable tokens at each position: natural log-probabilities [s, b, k] float32, tokens [s, b, k] int32,
    and the log of the mass of all others [s, b] float32. The same on every tensor rank."""

    logprobs: Tensor
    ids: Tensor
    log_tail: Tensor


class Hidden(NamedTuple):
    """The teacher's last hidden states [s, b, size], and this rank's rows of its output layer [columns.width, size].

    The teacher's logits are scale * states @ weight.T, then softcap * tanh(logits / softcap) unless softcap is 0.
    """

    states: Tensor
    weight: Tensor
    scale: float
    softcap: float
