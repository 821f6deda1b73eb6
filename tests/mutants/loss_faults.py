"""Faults in the loss, its validity and the teacher's forms."""

from __future__ import annotations

from faults import LOSS, Fault

_HEAD = "tests/loss/test_head.py"
_SHARDED = "tests/loss/test_sharded.py"
_SKIPPED = "tests/loss/test_skipped_rows.py"
_TOPK = "tests/loss/test_topk.py"
_VALIDITY = "tests/loss/test_validity.py"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, LOSS, f"vcrd/{file}", old, new, tests)


FAULTS = [
    _fault(
        "the two label validities changed places",
        "loss/validity.py",
        "return stats.student_label_logprob, stats.teacher_label_logprob",
        "return stats.teacher_label_logprob, stats.student_label_logprob",
        *(_VALIDITY, "-k", "match_the_reference and label"),
    ),
    _fault(
        "masked tokens take part in the mean of their step",
        "loss/validity.py",
        "member = steps >= 0 if keep is None else (steps >= 0) & keep",
        "member = steps >= 0",
        *(_VALIDITY, "-k", "match_the_reference and True"),
    ),
    _fault(
        "the mean weight is that of one rank's tokens",
        "loss/validity.py",
        "        dist.all_reduce(sums, group=config.weight_group)\n",
        "",
        *(_SHARDED, "-k", "mean_normalisation"),
    ),
    _fault(
        "a step's sums over context ranks are thrown away",
        "loss/validity.py",
        "        sums[:, :slots] = shared\n",
        "",
        "tests/loss/test_context_split.py",
    ),
    _fault(
        "a mixture's divergence is that of one shard",
        "loss/divergence.py",
        "        if group is not None and sums.shape[0]:\n            dist.all_reduce(sums, group=group)\n",
        "",
        *(_SHARDED, "-k", "reference and 2"),
    ),
    _fault(
        "the skewed reverse divergence takes alpha as the teacher's weight",
        "loss/config.py",
        '"skew_reverse_kl": 1 - self.alpha}',
        '"skew_reverse_kl": self.alpha}',
        *("tests/loss/test_divergence.py", "-k", "reference and False"),
    ),
    _fault(
        "with several blocks the caller's logits become the gradient",
        "loss/divergence.py",
        "gradient = student.detach() if overwrite else student.clone()",
        "gradient = student.detach()",
        *(_TOPK, "-k", "inputs_keep"),
    ),
    _fault(
        "padding of an inner shard may shift the teacher's columns",
        "loss/checks.py",
        "if width < columns or (inner and width != columns):",
        "if width < columns:",
        *(_SHARDED, "-k", "misaligned or one_sentence"),
    ),
    _fault(
        "the fused head divides the loss by the mean weight and not its gradient",
        "loss/fused_head.py",
        "factor = of_loss if ctx.divisor is None else of_loss / ctx.divisor",
        "factor = of_loss",
        *(_HEAD, "-k", "values_and_gradients"),
    ),
    _fault(
        "a fractional mask does not weigh the gradient of the output layer",
        "loss/fused_head.py",
        "states = (states * expected_here[:, None]).to(states.dtype)",
        "states = states.to(states.dtype)",
        *(_HEAD, "-k", "made_again"),
    ),
    _fault(
        "the shards' gradients of the hidden states are not added up",
        "loss/fused_head.py",
        "            dist.all_reduce(gradient, group=ctx.group)\n",
        "",
        *(_HEAD, "-k", "shards_match and 2"),
    ),
    _fault(
        "of an id that occurs twice any of its probabilities counts",
        "loss/teacher_blocks.py",
        'block.scatter_reduce_(1, places, logprobs, "amax", include_self=False)',
        "block.scatter_(1, places, logprobs)",
        *(_TOPK, "-k", "counts_once"),
    ),
    _fault(
        "what rounding took from the tail is not given back",
        "loss/teacher_blocks.py",
        "return (logprobs + lost[:, None], ids, subtracted)",
        "return (logprobs, ids, subtracted)",
        *(_TOPK, "-k", "match_the_reference and forward_kl or next_to_nothing"),
    ),
    _fault(
        "a student's NaN is skipped as if it were the teacher's",
        "loss/divergence.py",
        "    bad = bad & ~statistics[_STUDENT_ENTROPY].isnan()\n",
        "",
        *(_SKIPPED, "-k", "students"),
    ),
    _fault(
        "where invalid rows are skipped masked tokens count for the mean weight",
        "loss/api.py",
        "mask = ~stats.skipped if mask is None else ~stats.skipped & (mask != 0)",
        "mask = ~stats.skipped",
        *(_SKIPPED, "-k", "counts_beside"),
    ),
]
