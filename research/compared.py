"""Every method by name: baselines, methods of vcrd, controls, ideas, and variants of these."""

from __future__ import annotations

from dataclasses import replace

import methods as how
from methods import OWN, TRACES, Method, calibrated, halved, plain, shuffled

_LABELS, _VERIFIER = frozenset({"labels"}), frozenset({"verifier"})
_TRACES, _OWN = frozenset({TRACES}), frozenset({OWN})

# Methods for comparison with the variants.
_BESIDE_VARIANTS = frozenset(
    {"forward KL", "JSD", "label", "label, shuffled", "confidence", "scores, tokens"}
)
# To find out whether the default sharpness, 4, is the best one.
_SHARPNESS = {
    "confidence, sharpness 1": ("confidence", "forward_kl", 1.0),
    "confidence, sharpness 16": ("confidence", "forward_kl", 16.0),
    "JSD x label, sharpness 16": ("label", "jsd", 16.0),
}
# Methods for the map of where the calibration helps.
_GAINS = frozenset(
    {
        *("forward KL", "KL + CE", "JSD"),
        *("label", "label, shuffled", "label x own"),
        *("scores, tokens", "scores, shuffled", "scores, gate", "scores x own"),
        *("JSD x label", "JSD x label, shuffled", "JSD x scores", "JSD x scores, shuffled", "JSD x gate"),
    }
)


# Methods for the claims of docs/evidence.md, for short runs.
_CLAIMS = frozenset(
    {
        *("forward KL", "KL + CE", "JSD"),
        *("label", "label, shuffled", "confidence", "confidence, shuffled"),
        *("scores, tokens", "scores, shuffled"),
        *("JSD x label", "JSD x confidence", "JSD x scores"),
    }
)


def methods() -> list[Method]:
    return [*_usual(), *_variants()]


def sets() -> dict[str, frozenset[str]]:
    """Sets of names of methods that are compared with each other."""
    usual, variants = (frozenset(method.name for method in those) for those in (_usual(), _variants()))
    return {
        "usual": usual,
        "variants": (variants - set(_SHARPNESS)) | _BESIDE_VARIANTS,
        "sharpness": frozenset({*_SHARPNESS, "forward KL", "confidence", "JSD x label"}),
        "settings": frozenset(
            {
                *("forward KL", "JSD", "label", "label, sharpness 1", "label, sharpness 16", "label, 0 to 2"),
                *("confidence", "confidence, shuffled", "JSD x confidence"),
            }
        ),
        "gains": _GAINS,
        "claims": _CLAIMS,
    }


def named(text: str) -> list[Method]:
    """One of the sets, or methods by name, separated by ';'. ValueError for an unknown name."""
    known = {method.name: method for method in methods()}
    wanted = sets().get(text) or [name.strip() for name in text.split(";")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"--methods: expected one of {list(sets())} or names among {list(known)}, got {unknown[0]!r}"
        )
    return [method for name, method in known.items() if name in wanted]


def _usual() -> list[Method]:
    label, scores = calibrated("label"), calibrated("scores")
    zero_to_two, reversed_ = {"floor": 0.0, "ceiling": 2.0}, {"floor": 1.9, "ceiling": 0.1}
    found = [
        Method("hard labels", "baseline", how.none, ce=1.0, asks=_LABELS),
        Method("forward KL", "baseline", plain),
        Method("reverse KL", "baseline", plain, "reverse_kl"),
        Method("JSD", "baseline", plain, "jsd"),
        Method("skewed KL", "baseline", plain, "skew_kl"),
        Method("skewed reverse KL", "baseline", plain, "skew_reverse_kl"),
        Method("entropy gap", "baseline", how.entropy_gap),
        Method("top-5 accepted", "baseline", how.accepted(5)),
        Method("KL + CE", "baseline", halved(plain), ce=0.5, asks=_LABELS),
        Method("visibly wrong dropped", "baseline", how.not_visibly_wrong, asks=_LABELS, regimes=_TRACES),
        Method("label", "vcrd", label, asks=_LABELS, regimes=_TRACES),
        Method("margin", "vcrd", calibrated("margin")),
        Method("confidence", "vcrd", calibrated("confidence")),
        Method("scores, tokens", "vcrd", scores, asks=_VERIFIER),
        Method("scores, steps", "vcrd", calibrated("scores", by_step=True), asks=_VERIFIER),
        Method("label, shuffled", "control", shuffled(label), asks=_LABELS, regimes=_TRACES),
        Method(
            "label, reversed",
            "control",
            calibrated("label", **reversed_),
            asks=_LABELS,
            regimes=_TRACES,
        ),
        Method("scores, shuffled", "control", shuffled(scores), asks=_VERIFIER),
        Method("scores, reversed", "control", calibrated("scores", **reversed_), asks=_VERIFIER),
        Method(
            "label, capped",
            "idea",
            how.capped(calibrated("label", **zero_to_two)),
            asks=_LABELS,
            regimes=_TRACES,
        ),
        Method("label x own", "idea", how.teacher_absolute, asks=_LABELS, regimes=_TRACES),
        Method("scores, capped", "idea", how.capped(calibrated("scores", **zero_to_two)), asks=_VERIFIER),
        Method("scores, gate", "idea", how.gate, asks=_VERIFIER),
        Method("scores x own", "idea", how.relative_and_absolute, asks=_VERIFIER),
        Method("scores, corrections only", "idea", how.corrections, asks=_VERIFIER),
        Method("until the first error", "idea", how.until_the_first_error, asks=_VERIFIER, regimes=_OWN),
        Method("label + CE", "idea", halved(label), ce=0.5, asks=_LABELS, regimes=_TRACES),
        Method("scores + CE", "idea", halved(scores), ce=0.5, asks=_VERIFIER | _LABELS),
        Method(
            "scores x own + CE", "idea", halved(how.relative_and_absolute), ce=0.5, asks=_VERIFIER | _LABELS
        ),
        Method(
            "label, first student",
            "idea",
            calibrated("label", first=True),
            asks=_LABELS,
            against_first=True,
            regimes=_TRACES,
        ),
    ]
    for name, validity in (("label", "label"), ("scores, tokens", "scores")):
        (usual,) = [method for method in found if method.name == name]
        found.append(replace(usual, name=f"{name}, mean", weights=calibrated(validity, normalization="mean")))
    return found


def _variants() -> list[Method]:
    label, scores, confidence = (calibrated(validity) for validity in ("label", "scores", "confidence"))
    wide, narrow = {"floor": 0.0, "ceiling": 2.0}, {"floor": 0.5, "ceiling": 1.5}
    found = [Method("confidence, shuffled", "control", shuffled(confidence))]
    for name, more in (
        ("label, sharpness 1", {"sharpness": 1.0}),
        ("label, sharpness 16", {"sharpness": 16.0}),
        ("label, 0 to 2", wide),
        ("label, 0.5 to 1.5", narrow),
    ):
        found.append(Method(name, "variant", calibrated("label", **more), asks=_LABELS, regimes=_TRACES))
    for name, more in (("scores, 0 to 2", wide), ("scores, 0.5 to 1.5", narrow)):
        found.append(Method(name, "variant", calibrated("scores", **more), asks=_VERIFIER))
    # The weights with the bounded divergence, which is better on the student's own prefixes.
    for name, weights, ce, asks in (
        ("JSD + CE", halved(plain), 0.5, _LABELS),
        ("JSD x confidence", confidence, 0.0, frozenset()),
        ("JSD x label", label, 0.0, _LABELS),
        ("JSD x label, shuffled", shuffled(label), 0.0, _LABELS),
        ("JSD x scores", scores, 0.0, _VERIFIER),
        ("JSD x scores, shuffled", shuffled(scores), 0.0, _VERIFIER),
        ("JSD x gate", how.gate, 0.0, _VERIFIER),
        ("JSD x scores x own", how.relative_and_absolute, 0.0, _VERIFIER),
        ("JSD x scores x own + CE", halved(how.relative_and_absolute), 0.5, _VERIFIER | _LABELS),
    ):
        regimes = _TRACES if "label" in name else _TRACES | _OWN
        group = "control" if "shuffled" in name else "variant"
        found.append(Method(name, group, weights, "jsd", ce, asks, regimes=regimes))
    for name, (validity, divergence, sharpness) in _SHARPNESS.items():
        asks, regimes = (_LABELS, _TRACES) if validity == "label" else (frozenset(), _TRACES | _OWN)
        weights = calibrated(validity, sharpness=sharpness)
        found.append(Method(name, "variant", weights, divergence, asks=asks, regimes=regimes))
    return found
