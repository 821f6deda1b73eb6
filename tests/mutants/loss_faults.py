"""Faults in the loss, its validity and the teacher's forms."""

from __future__ import annotations

from faults import LOSS, Fault

_HEAD = "tests/loss/test_head.py"
_OTHER_TORCH = "tests/loss/test_other_torch.py"
_SHARDED = "tests/loss/test_sharded.py"
_SKIPPED = "tests/loss/test_skipped_rows.py"
_TOPK = "tests/loss/test_topk.py"
_VALIDITY = "tests/loss/test_validity.py"
_WEIGHTING = "tests/loss/test_weighting.py"


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
        "the gap is taken in log-probabilities",
        "loss/validity.py",
        "student, teacher = (each.double().exp() for each in judged)",
        "student, teacher = (each.double() for each in judged)",
        *(_WEIGHTING, "-k", "match_the_reference or by_hand"),
    ),
    _fault(
        "the student's proposal takes no part in the gap",
        "loss/validity.py",
        "torch.where(unverified, 0.0, of_teacher + of_student)",
        "torch.where(unverified, 0.0, of_teacher)",
        *(_WEIGHTING, "-k", "as_far_as_it_is_accepted"),
    ),
    _fault(
        "a proposal counts whether or not it is accepted",
        "loss/validity.py",
        "of_student = student * (p.double().exp() - q.double().exp())",
        "of_student = p.double().exp() - q.double().exp()",
        *(_WEIGHTING, "-k", "as_far_as_it_is_accepted"),
    ),
    _fault(
        "a proposal of both models counts twice in the gap",
        "loss/validity.py",
        "torch.where(stats.student_action == stats.teacher_action, 0.0, of_student)",
        "of_student",
        *(_WEIGHTING, "-k", "counts_once"),
    ),
    _fault(
        "the mean square of the gap without its root",
        "loss/validity.py",
        "(squares / count.clamp(min=1)).sqrt()",
        "(squares / count.clamp(min=1))",
        *(_WEIGHTING, "-k", "match_the_reference"),
    ),
    _fault(
        "tokens that the mask leaves out take part in the statistics of the weights",
        "loss/validity.py",
        "        counts = counts & keep\n",
        "        pass\n",
        *(_WEIGHTING, "-k", "match_the_reference"),
    ),
    _fault(
        "a token that is no number takes part in the statistics of the weights",
        "loss/validity.py",
        "torch.where(counts, value.double(), 0.0).sum() for value in (a, b)",
        "value.double().sum() for value in (a, b)",
        *(_WEIGHTING, "-k", "no_number"),
    ),
    _fault(
        "the mass is divided by the weighted mass",
        "loss/validity.py",
        "found / usual.clamp(min=1e-300), 1.0",
        "usual / found.clamp(min=1e-300), 1.0",
        *(_WEIGHTING, "-k", "mass_is_kept"),
    ),
    _fault(
        "a gap has the ceiling of the sigmoid",
        "loss/config.py",
        '"gap": WeightMap(1.0, 0.05, 3.0)',
        '"gap": WeightMap(1.0, 0.05, 1.9)',
        *(_WEIGHTING, "-k", "by_hand"),
    ),
    _fault(
        "the fused head divides by no normalization",
        "loss/fused_head.py",
        "            weights[0] /= ctx.divisor\n",
        "",
        *(_WEIGHTING, "-k", "match_the_reference"),
    ),
    _fault(
        "the statistics of the weights are those of one rank",
        "megatron/distillation.py",
        "weight_group=self.layout.weight_group,",
        "weight_group=None,",
        *("tests/megatron/test_pooled_weights.py", "-k", "tp1-pp1-dp2"),
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
    _fault(
        "an extension of another minor version of torch is loaded",
        "build_record.py",
        "_numbers(built, 2) == _numbers(torch_version, 2)",
        "_numbers(built, 1) == _numbers(torch_version, 1)",
        *(_OTHER_TORCH, "-k", "must_agree"),
    ),
]
