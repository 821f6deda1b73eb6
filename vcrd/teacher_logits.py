"""The one form in which a teacher's answer travels: `vcrd.link` returns it, and the loss takes it.

It is a logit for each column, the most probable tokens, the last hidden states, or a mixture of several teachers. Each
holds everything that its logits are made of. It checks nothing: the loss checks it, together on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DenseLogits:
    """One logit for each column of the student's shard. For the loss a plain tensor means the same without `row_max`.

    Attributes:
        logits: [..., vocabulary shard]: float32, bfloat16 or float16. Or uint8: the square-root code c, which stands
            for a logit that lies 24 (c / 255)^2 below the maximum of its row, and which the kernels decode in
            registers. The first column is that of the student's shard, and all of its true columns are there; padding
            may differ.
        row_max: [...], float32, added to the logits of each row: the maxima that codes, or float16 distances, were
            taken from. Only needed where these differ between the shards of a row, since a shift of the whole row
            changes nothing.
    """

    logits: Tensor
    row_max: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TopKLogits:
    """The teacher's log-probabilities of its k best tokens, and of all others together: the tail, one outcome more.

    The divergence is that of two distributions over k + 1 outcomes. No mass is dropped and none is made up, so it is a
    lower bound of the divergence over the whole vocabulary (data processing inequality), and equal to it where k covers
    the vocabulary.

    It is computed over the whole vocabulary. Let the teacher's tail have the student's own shape: p'_j = p_T q_j / q_T
    for j in the tail, and p'_j = p_j at the ids. Each of our divergences is a sum_j q_j phi(p'_j / q_j). In the tail
    p'_j / q_j is r = p_T / q_T throughout, so its terms add up to q_T phi(r), the term of the one outcome: the values
    agree. At fixed p' the derivative to q_j is phi(r) - r phi'(r), and so is that of q_T phi(p_T / q_T) to q_T: the
    gradients agree, although p' is made from q. (This project's own derivation.)

    The statistics of the teacher are its own and not those of p'. The ids are taken to be its most probable tokens. So
    no other token has more than b, the smaller of p_T and of the least probability of an id.

    - `teacher_action` is the most probable id, of equal ones the lowest; -1 where a row has no id.
    - Of an id, log-probabilities are the teacher's. Of any other token, be it the label or the student's action, they
      are log b: an upper bound.
    - `teacher_entropy` is -sum p_i log p_i - p_T log b: a lower bound.

    With all tokens, or all but one, among the ids these are the statistics of the whole distribution. Validity "margin"
    of the student, where its action is no id, and "confidence" of the teacher are thus upper bounds. For validity
    "label" of a label that is no id, both models are judged by the outcome that it belongs to: the loss takes the ratio
    of the two validities to be that of the tails, p_T / q_T.

    The k + 1 masses are normalised to 1. An id may occur more than once in a row; the largest of its log-probabilities
    counts, once. An entry of log-probability -inf is none, so that rows may have fewer than k. Where the student gives
    the tail no probability, as when the ids are the whole vocabulary, the tail is no outcome and its mass is left out.

    Only for temperature 1: what the tail weighs at any other is not known.

    Attributes:
        logprobs: [..., k], float32: natural log-probabilities at temperature 1.
        ids: [..., k], integers over the whole vocabulary, in any order. The same on every rank of the group. Not read
            where the log-probability is -inf.
        log_tail: [...], float32: the log of the mass outside these ids, exact; -inf for none.
    """

    logprobs: Tensor
    ids: Tensor
    log_tail: Tensor


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The teacher's last hidden states, and this rank's shard of its output layer.

    Its logits are `scale * states @ weight.T`, then `softcap * tanh(logits / softcap)` where a softcap is given. They
    are float32 from the product's accumulator on, are made for a block of tokens at a time, in each pass anew, and
    never exist as a whole.

    Attributes:
        states: [..., hidden size], float32, bfloat16 or float16, after the final norm. The same on every rank.
        weight: [vocabulary shard, hidden size], any of these dtypes: the rows that belong to the columns of the
            student's shard; padding may differ as that of `DenseLogits` may. It is multiplied as `factor_of` says: to
            give many objects the same weight, convert it once with that function.
        scale: multiplies the logits.
        softcap: bounds the logits; None for no bound.
    """

    states: Tensor
    weight: Tensor
    scale: float = 1.0
    softcap: float | None = None

    @cached_property
    def factor(self) -> Tensor:
        """`weight` as it is multiplied."""
        return factor_of(self.weight, self.states.dtype)


@dataclass(frozen=True, eq=False)
class MixedLogits:
    """The mixture of several teachers: p = sum_t w_t p_t at each token, with the weights w_t scaled to a sum of 1.

    p_t is teacher t's distribution at temperature 1, over the whole vocabulary. The mixture is computed by blocks of
    tokens, as `HiddenStates` are, and never exists as a whole. It takes one pass over each teacher's logits more than
    one teacher does: for log sum exp of each row, which puts the teachers on one scale.

    A mixture of top k is none of these: of a token that only one of the teachers names, the others' share is not known.

    Attributes:
        teachers: at least one, of the same tokens and columns; their dtypes, padding and hidden sizes may differ.
        weights: one number above 0 for each.
    """

    teachers: tuple[DenseLogits | HiddenStates, ...]
    weights: tuple[float, ...]


TeacherLogits = DenseLogits | TopKLogits | HiddenStates | MixedLogits


def factor_of(weight: Tensor, states: torch.dtype) -> Tensor:
    """The weight of an output layer as hidden states of this dtype are multiplied with it, detached.

    On CUDA a weight of their own 16-bit dtype is multiplied as it is, with float32 sums. Any other is taken in float32.
    """
    weight = weight.detach()
    narrow = weight.is_cuda and weight.dtype == states and "dtype" in torch.ops.aten.mm.overloads()
    return weight if narrow else weight.float()
