"""Every method by name: baselines, methods of vcrd, controls, ideas, and variants of these."""

from __future__ import annotations

from dataclasses import replace

import methods as how
import weighting as by
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


# Signals by which the proposals of the models are weighed against each other, and the names of their weights.
SIGNALS = {
    "gap": by.gap,
    "verdicts": by.verdict_difference,
    "accepted mass": by.accepted_mass,
    "signed mass": by.signed_mass,
}
# The weighting that has controls. Another control, a constant that keeps the sum of the divergence, is JSD itself.
WINNER = "JSD x accepted mass, kept"
CONTROLS = tuple(
    f"{WINNER}, {control}"
    for control in ("shuffled", "by position", "by divergence", "reversed", "sign", "size")
)
# Where families leave a choice: baselines, rivals and candidates.
_WEIGHTING = (
    *("forward KL", "KL + CE", "JSD", "JSD x position", "JSD x confidence, kept"),
    *("JSD x scores", "JSD x scores, kept", "JSD x until the first error, kept", "JSD x gate, kept"),
    *("JSD x gap", "JSD x gap, kept", "JSD x verdicts, kept"),
    *("JSD x accepted mass", WINNER, "JSD x signed mass, kept"),
    *("JSD x soft scores", "JSD x soft scores, kept"),
    # A verifier that judges a step after a wrong one by what is written.
    *("JSD x scores, local", "JSD x gate, local, kept", "JSD x accepted mass, local, kept"),
)
# Candidates that are also trained with verifiers that err.
JUDGED_WEIGHTS = (
    *("JSD x gate, kept", "JSD x until the first error, kept"),
    *("JSD x gap, kept", WINNER, "JSD x soft scores, kept"),
)
_UNJUDGED = ("JSD", "JSD x position", "JSD x confidence, kept")
_WORSE = (*_WEIGHTING[1:4], "JSD x scores", *JUDGED_WEIGHTS, *CONTROLS[:4])
# Further baselines and candidates.
_FURTHER = (
    *("JSD", "JSD + CE", "reverse KL", "skewed KL", "entropy gap", "JSD x entropy gap"),
    *(WINNER, "JSD x accepted mass, half, kept", "JSD x accepted mass, double, kept", "JSD x valid spared"),
)
# Verdicts from other sources than a verifier of each token: the outcome, a judge that sees a solution, and none.
_SOURCES = (
    *("JSD", WINNER, "JSD x outcome", "JSD x wrong outcome", "JSD x gap, outcome", "outcome + CE"),
    *("JSD x gap, judge, kept", "JSD x accepted mass, judge, kept", "JSD x scores, judge"),
    *("JSD x proposal gap, kept", "JSD x confidence"),
)
# On the teacher's solutions: the defaults of the package, their controls, and the candidates.
_SOLUTIONS = (
    *("forward KL", "KL + CE", "label", "label, shuffled", "label, reversed", *_UNJUDGED),
    *("JSD x label", "JSD x label, shuffled", "JSD x scores", *JUDGED_WEIGHTS[2:], "JSD x gate, kept"),
)
# For families that nobody has looked at: what is recommended, its rivals and controls.
_HELD_OUT = (
    *("forward KL", "KL + CE", "label", "label, shuffled"),
    *("JSD", "JSD x label", "JSD x scores", "JSD x scores, shuffled", WINNER, CONTROLS[0]),
)


def methods() -> list[Method]:
    return [*_usual(), *_variants(), *_weightings()]


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
        "weighting": frozenset(_WEIGHTING),
        "worse teachers": frozenset(_WORSE),
        "controls": frozenset(("JSD", WINNER, *CONTROLS)),
        "erring": frozenset((*_UNJUDGED, "JSD x scores", *JUDGED_WEIGHTS)),
        "further": frozenset(_FURTHER),
        "sources": frozenset(_SOURCES),
        "solutions": frozenset(_SOLUTIONS),
        "held out": frozenset(_HELD_OUT),
    }


def named(text: str) -> list[Method]:
    """Sets and methods by name, separated by ';'. ValueError for an unknown name."""
    known, those = {method.name: method for method in methods()}, sets()
    wanted: set[str] = set()
    for name in (part.strip() for part in text.split(";")):
        if name not in those and name not in known:
            raise ValueError(
                f"--methods: expected names among {list(those)} and {list(known)}, separated by ';', got {name!r}"
            )
        wanted |= those.get(name, {name})
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


def _weightings() -> list[Method]:
    """On both kinds of prefixes, with JSD. `kept`: the sum of the divergence of the micro-batch is kept."""
    both = _LABELS | _VERIFIER
    found = []
    for signal, of in SIGNALS.items():
        found.append(Method(f"JSD x {signal}, kept", "idea", by.kept(by.scaled(of)), "jsd", asks=both))
    weights, mass = by.scaled(by.accepted_mass), by.accepted_mass
    each = (
        shuffled(weights),
        by.shuffled_within(weights, by.by_position),
        by.shuffled_within(weights, by.by_divergence),
        by.scaled(by.reversed_(mass)),
        by.scaled(by.sign_only(mass)),
        by.scaled(by.size_only(mass)),
    )
    for name, its in zip(CONTROLS, each, strict=True):
        found.append(Method(name, "control", by.kept(its), "jsd", asks=both))
    found.append(
        Method("JSD x scores, kept", "variant", by.kept(calibrated("scores")), "jsd", asks=_VERIFIER)
    )
    for name, weights in (
        ("gap", by.scaled(by.gap)),
        ("accepted mass", by.scaled(by.accepted_mass)),
        ("accepted mass, half, kept", by.kept(by.scaled(by.accepted_mass, 0.5))),
        ("accepted mass, double, kept", by.kept(by.scaled(by.accepted_mass, 2.0))),
        ("gate, kept", by.kept(how.gate)),
        ("soft scores", by.soft_scores),
        ("soft scores, kept", by.kept(by.soft_scores)),
        ("valid spared", by.spare_the_valid),
        ("until the first error, kept", by.kept(how.until_the_first_error)),
    ):
        found.append(Method(f"JSD x {name}", "idea", weights, "jsd", asks=both))
    for name, weights in (
        ("position", by.position),
        ("confidence, kept", by.kept(calibrated("confidence"))),
        ("entropy gap", how.entropy_gap),
        ("proposal gap, kept", by.kept(by.scaled(by.proposal_gap))),
    ):
        found.append(Method(f"JSD x {name}", "variant", weights, "jsd"))
    for source, name, weights in (
        ("outcome", "outcome", by.outcome_gate),
        ("outcome", "wrong outcome", by.wrong_outcome_gate),
        ("outcome", "gap, outcome", by.scaled(by.gap)),
        ("judge", "gap, judge, kept", by.kept(by.scaled(by.gap))),
        ("judge", "accepted mass, judge, kept", by.kept(by.scaled(by.accepted_mass))),
        ("judge", "scores, judge", calibrated("scores")),
        ("local", "accepted mass, local, kept", by.kept(by.scaled(by.accepted_mass))),
        ("local", "scores, local", calibrated("scores")),
        ("local", "gate, local, kept", by.kept(how.gate)),
    ):
        asks = _LABELS if source == "outcome" else both
        found.append(
            Method(f"JSD x {name}", "variant", weights, "jsd", asks=asks, source=source, regimes=_OWN)
        )
    # Half of each, where the labels are the written tokens of correct solutions.
    found.append(
        Method("outcome + CE", "variant", halved(plain), "jsd", 0.5, _LABELS, source="outcome", regimes=_OWN)
    )
    return found
