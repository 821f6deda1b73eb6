"""The settings of the loss that do not change from call to call. Needs no compiled extension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import check_bool, check_choice, check_integer, check_number, expected, wrong_type

DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl")
ESTIMATORS = ("label", "margin", "confidence", "scores", "privileged", "uniform")
NORMALIZATIONS = ("none", "mean", "mass")
IF_UNUSED = "if_unused"
UPSTREAM = ("look", "even", "uneven")
# Of float32 logits: [256, 131072]. Each chunk reads the weight, and reads and writes its float32 gradient, so it should
# be of many tokens: docs/performance.md has what smaller ones cost on CPU.
CHUNK_BYTES = 128 << 20

# Given `DivergenceStats`, returns the validity of the student and of the teacher.
Estimator = Callable[[Any], tuple[Tensor, Tensor]]


class WeightMap(NamedTuple):
    """What a weighting is made with: see the fields of `LossConfig`."""

    sharpness: float
    floor: float
    ceiling: float


# What each weighting is made with where the configuration does not say it.
WEIGHTINGS = {"sigmoid": WeightMap(4.0, 0.1, 1.9), "gap": WeightMap(1.0, 0.05, 3.0)}
# Estimators that name no verified token, whose gap would be.
_WITHOUT_GAP = ("margin", "confidence", "uniform")


@dataclass(frozen=True)
class LossConfig:
    """Settings of `validity_calibrated_kl`, checked once, when the object is made.

    Each field may also be given to a function of the loss as a keyword, which counts before the one in `config`.

    Attributes:
        divergence: of the teacher's p and the student's q. "forward_kl" KL(p||q), "reverse_kl" KL(q||p), "jeffreys"
            half of each. "jsd" beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q (GKD, arXiv
            2306.13649). "skew_kl" KL(p || alpha p + (1 - alpha) q), "skew_reverse_kl" KL(q || alpha q + (1 - alpha) p)
            (DistiLLM, arXiv 2402.03898).
        temperature: of both models in the divergence, above 0. Everything else is read at temperature 1.
        alpha: in [0, 1), for the two skewed divergences.
        beta: in (0, 1), for "jsd".
        vocab_size: the true vocabulary. Columns at and past it are padding: no probability, zero gradient. None: all
            columns are true.
        validity: how the validity V of a model m is estimated.

            - "label": pi_m(y), the chance that m's sampled proposal is the verified next token y. Tokens without a
              label (negative) have no verdict: both validities are 1. Labels must be verified tokens, not the teacher's
              own samples, which would raise the weight exactly where the teacher errs.
            - "margin": geometric mean of both models' probabilities at m's most probable token.
            - "confidence": exp(-entropy of m). Where only the teacher's top k are known, "confidence" of the teacher is
              an upper bound, and so is "margin" of the student whose token is not among them.
            - "scores": `student_validity` and `teacher_validity`, from a verifier, a process reward model or rollouts.
            - "privileged": the probability that a judge gives m's most probable token. The judge is a teacher that
              knows more than the one that is distilled, for example the solution: `judge`, an argument of the loss.
            - "uniform": 1, so the weight is (floor + ceiling) / 2 everywhere: the plain-distillation control.
            - a callable: given `DivergenceStats`, returns the student's and the teacher's validity, each [...] in (0,
              1].
        weighting: what makes a weight of the validities.

            - "sigmoid": floor + (ceiling - floor) rho, of the relative validity rho = sigmoid(sharpness (log V_T - log
              V_S)).
            - "gap": 1 + sharpness d / RMS(d), clipped to [floor, ceiling]. d is how much more probability the teacher
              gives to what is verified than the student does. With "label", d = p(y) - q(y) of the label y, and 0
              without one. With "scores", "privileged" and a callable, d is the sum of V(a) (p(a) - q(a)) over the most
              probable tokens a of both models, once if they are the same: with the verdicts 0 and 1 of a verifier, the
              teacher's probability of the accepted proposals minus the student's. RMS(d), the root of the mean square,
              is over all tokens that count, and at least 1e-6. The other estimators verify no token.
        sharpness: how strongly the weight follows the validities. None: 4 for "sigmoid", 1 for "gap". 1 makes rho = V_T
            / (V_T + V_S).
        floor, ceiling: smallest and largest weight. None: 0.1 and 1.9 for "sigmoid", 0.05 and 3 for "gap". floor >
            ceiling reverses the direction of "sigmoid", for an ablation.
        steps_group: the ranks that hold parts of the same steps, each as many tokens (context parallelism). The ids in
            `steps` are then below the number of tokens of all of them.
        normalization: what all weights are divided by. "none". "mean": their mean. "mass": sum w D / sum D, which keeps
            the sum of the losses without a cross-entropy that all weights 1 would have.
        weight_group: the ranks over whose tokens RMS(d), "mean" and "mass" are taken, for example all data- and
            context-parallel ranks; each calls the loss as often, also without a token that counts. None: over the
            tokens of this call. A token that the mask leaves out, or whose value is not finite, takes no part.
        ce_weight: weight of the hard-label cross-entropy, which shares the one backward pass; not calibrated.
        skip_invalid_teacher: treat rows whose teacher is no distribution as masked: those with a NaN or +inf, with
            nothing above -inf, or, of codes without `row_max`, with none below 255 (how the link marks them). All of
            their statistics are 0; `DivergenceStats.skipped` says which they are. A row in which the student has a NaN
            is never skipped. Found in the merged statistics, so alike on every rank, at no cost and without waiting for
            the device.
        inplace_gradient: let backward overwrite the student's logits with their gradient, which saves a buffer of their
            size. Backward then runs once. It raises autograd's version counter, as every in-place operation of torch:
            where another term or a second loss on the same logits needs them later, torch raises RuntimeError.
            "if_unused": only where nothing else holds the logits by then, that is no other node of the graph, no view
            and no Python variable; otherwise into a buffer. Always into a buffer under torch.compile, which plans its
            own, and for logits whose rows are not evenly spaced, that share memory with each other (`expand`) or with
            the teacher. On CPU, where fresh pages cost more than the arithmetic, the buffer of the last large gradient
            is kept for the next one, if the teacher is dense. The fused head has no logits, and does not read this.

    Raises TypeError or ValueError that names the field.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    alpha: float = 0.1
    beta: float = 0.5
    vocab_size: int | None = None
    validity: str | Estimator = "label"
    weighting: str = "sigmoid"
    sharpness: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    steps_group: dist.ProcessGroup | None = None
    normalization: str = "none"
    weight_group: dist.ProcessGroup | None = None
    ce_weight: float = 0.0
    skip_invalid_teacher: bool = False
    inplace_gradient: bool | str = False

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_number("temperature", self.temperature, above=0)
        check_number("alpha", self.alpha, least=0, below=1)
        check_number("beta", self.beta, above=0, below=1)
        check_integer("vocab_size", self.vocab_size, 1, optional=True)
        if not callable(self.validity) and self.validity not in ESTIMATORS:
            what = f"one of {', '.join(ESTIMATORS)} or a callable"
            raise expected("validity", what, repr(self.validity))
        check_choice("weighting", self.weighting, tuple(WEIGHTINGS))
        for name in WeightMap._fields:
            check_number(name, getattr(self, name), least=0, optional=True)
        if self.weighting == "gap":
            self._check_gap()
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_number("ce_weight", self.ce_weight)
        check_bool("skip_invalid_teacher", self.skip_invalid_teacher)
        if not isinstance(self.inplace_gradient, bool) and self.inplace_gradient != IF_UNUSED:
            what = f"True, False or {IF_UNUSED!r}"
            raise expected("inplace_gradient", what, repr(self.inplace_gradient))

    def _check_gap(self) -> None:
        if self.validity in _WITHOUT_GAP:
            what = f"'sigmoid' with validity {self.validity!r}, which names no verified token"
            raise expected("weighting", what, "'gap'")
        if self.weight_map.floor > self.weight_map.ceiling:
            what = f"at most the ceiling {self.weight_map.ceiling:g} with weighting 'gap'"
            raise expected("floor", what, f"{self.weight_map.floor:g}")

    @property
    def weight_map(self) -> WeightMap:
        """sharpness, floor and ceiling, those that are None as the weighting has them."""
        given = (getattr(self, name) for name in WeightMap._fields)
        usual = WEIGHTINGS[self.weighting]
        return WeightMap(*(own if value is None else value for value, own in zip(given, usual, strict=True)))

    @property
    def pooled(self) -> str | None:
        """The field by which a token's weight depends on the other tokens that count; None where it does not."""
        if self.weighting == "gap":
            return "weighting"
        return None if self.normalization == "none" else "normalization"

    @property
    def mixture_weight(self) -> float | None:
        """The teacher's weight in the mixture that the divergence compares with; None where there is no mixture."""
        weights = {"jsd": self.beta, "skew_kl": self.alpha, "skew_reverse_kl": 1 - self.alpha}
        return weights.get(self.divergence)


@dataclass(frozen=True, eq=False)
class HeadConfig:
    """Settings of the output layer of `fused_validity_calibrated_kl`, checked when the object is made.

    Each field may also be given to the function as a keyword.

    Attributes:
        scale, softcap: of the logits; None for no bound.
        sequence_parallel: `hidden` is gathered in the function, and its gradient reduced and scattered.
        accumulate_main_grad: the weight's gradient is added to `weight.main_grad` in backward, and
            `weight.grad_added_to_main_grad`, where there is one, is set, as Megatron does.
        upstream: what is known of the gradient that backward will bring for `loss`. It is even where it is the same for
            all tokens that count, up to the values of a floating `mask`, as it is for a masked sum or mean over tokens.

            - "look": nothing is known. Gradients are made in forward, where the logits are at hand: three products with
              the weight in all. They are kept until backward: float32 of the shapes of `hidden` and `weight`. Backward
              waits for the device once, to see whether the upstream gradient is even. Where it is not, or where
              something besides `loss` is differentiated, backward makes the logits again: a fourth and a fifth product.
            - "even": a promise. As "look", but backward waits for nothing. Where the upstream gradient is not even, the
              gradient of `weight` is NaN.
            - "uneven": backward makes the logits again in any case: four products, and nothing is kept but some numbers
              per token. It is always so with `steps`, a callable `validity` or "privileged", the weighting "gap", or a
              normalization beside a `ce_weight`.
        found_uneven: one float32 on the device of `hidden`, to which backward adds 1 where it looked at the upstream
            gradient of `loss`, or was promised an even one, and it was not even. It does not wait for it.
        chunk_bytes: of float32 logits at a time, of the teacher's as well where they are made here. The same on every
            rank. A chunk costs one pass over `weight` and two over its float32 gradient.

    Raises TypeError or ValueError that names the field.
    """

    scale: float = 1.0
    softcap: float | None = None
    sequence_parallel: bool = False
    accumulate_main_grad: bool = False
    upstream: str = "look"
    found_uneven: Tensor | None = None
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        check_number("scale", self.scale, above=0)
        check_number("softcap", self.softcap, above=0, optional=True)
        check_bool("sequence_parallel", self.sequence_parallel)
        check_bool("accumulate_main_grad", self.accumulate_main_grad)
        check_choice("upstream", self.upstream, UPSTREAM)
        check_integer("chunk_bytes", self.chunk_bytes, 1)
        found = self.found_uneven
        if found is None:
            return
        if not isinstance(found, Tensor):
            raise wrong_type("found_uneven", "a tensor or None", found)
        if found.numel() != 1 or found.dtype != torch.float32:
            raise expected("found_uneven", "one float32", f"{list(found.shape)} {found.dtype}")


_DEFAULT, _DEFAULT_HEAD = LossConfig(), HeadConfig()
_LOSS_FIELDS = frozenset(field.name for field in fields(LossConfig))
_HEAD_FIELDS = frozenset(field.name for field in fields(HeadConfig))
Config = TypeVar("Config", LossConfig, HeadConfig)


def loss_config(config: LossConfig | None, options: Mapping[str, Any]) -> LossConfig:
    """`config`, or the default, with these keywords of a call. Raises TypeError for a name that is no field."""
    config = _given("config", config, _DEFAULT)
    if not options:
        return config
    _refuse_unknown(options, _LOSS_FIELDS, "LossConfig")
    return LossConfig(**options) if config is _DEFAULT else replace(config, **options)


def fused_configs(
    head: HeadConfig | None, config: LossConfig | None, options: Mapping[str, Any]
) -> tuple[HeadConfig, LossConfig]:
    """As `loss_config`, for the fused head, whose keywords are fields of either."""
    head, config = _given("head", head, _DEFAULT_HEAD), _given("config", config, _DEFAULT)
    if not options:
        return head, config
    _refuse_unknown(options, _LOSS_FIELDS | _HEAD_FIELDS, "LossConfig or HeadConfig")
    own = {name: value for name, value in options.items() if name in _HEAD_FIELDS}
    rest = {name: value for name, value in options.items() if name not in _HEAD_FIELDS}
    return replace(head, **own) if own else head, replace(config, **rest) if rest else config


def refuse_pooled(config: LossConfig) -> None:
    """ValueError for weights that depend on other tokens, where a framework cuts batches into parts by their size."""
    name = config.pooled
    if name is not None:
        what = f"{getattr(_DEFAULT, name)!r}: a statistic over one micro-batch depends on its size"
        raise expected(name, what, repr(getattr(config, name)))


def refuse_given_validity(config: LossConfig, what: str) -> None:
    """ValueError for a validity that comes beside the two models' logits, where a framework gives nothing more.

    what: which validity is right there.
    """
    if config.validity in ("scores", "privileged"):
        raise expected("validity", what, repr(config.validity))


def _given(name: str, config: Config | None, default: Config) -> Config:
    if config is None:
        return default
    if not isinstance(config, type(default)):
        raise wrong_type(name, f"a {type(default).__name__} or None", config)
    return config


def _refuse_unknown(options: Mapping[str, Any], known: frozenset[str], owner: str) -> None:
    for name in options:
        if name not in known:
            raise expected(name, f"an argument of this function or a field of {owner}", "neither", TypeError)
