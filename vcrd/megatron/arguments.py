"""The settings of distillation as command-line arguments, next to Megatron's own: `--vcrd-sharpness 2`."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import partial
from typing import Any

from vcrd.link.settings import LinkSettings
from vcrd.loss.validity import validity_weights
from vcrd.megatron.settings import DistillSettings

# A command line is read by everyone on the machine, so a secret has a file or the environment.
_NOT_ARGUMENTS = ("link", "secret")
# What is said elsewhere of tensors, or in a list of formulas.
_TEXTS = {
    "divergence": "forward_kl KL(p||q) of the teacher's p and the student's q, reverse_kl, jeffreys (half of each), "
    "jsd, skew_kl or skew_reverse_kl.",
    "temperature": "of both models in the divergence; validity is always read at 1.",
    "alpha": "the mixture of skew_kl and skew_reverse_kl.",
    "beta": "the mixture of jsd.",
    "validity": "the estimator of local validity: label, margin, confidence, scores or uniform.",
    "steps": "micro-batches carry the reasoning step of each token, over which log validity is averaged.",
    "normalization": "of the weights: none, or mean, which divides by their masked mean and needs steps of one "
    "micro-batch on one data-parallel rank.",
    "ce_weight": "weight of the hard-label cross-entropy that is added; not calibrated.",
    "secret_file": "a file with the secret that both jobs must know; VCRD_SECRET holds the secret itself.",
}
# Where another setting is explained; the first that does counts.
_EXPLAINED_BY = (DistillSettings, LinkSettings, validity_weights)


def add_vcrd_args(
    parser: argparse.ArgumentParser, environment: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """Adds the group `--vcrd-*`, one argument for each setting, and returns the parser: an `extra_args_provider`.

    Each field of `DistillSettings` and of `LinkSettings` is an argument, but for `secret`, which comes from a file
    (`--vcrd-secret-file`) or from VCRD_SECRET. Defaults are the VCRD_* variables of `environment` (default: the
    process's). Raises ValueError for a variable that is no setting or has a wrong value.
    """
    defaults = DistillSettings.from_environment(environment)
    group = parser.add_argument_group(
        "vcrd", "Distillation. Defaults come from the environment: VCRD_SHARPNESS for --vcrd-sharpness."
    )
    for field, owner in _settings(defaults):
        default = getattr(owner, field.name)
        option = "--vcrd-" + field.name.replace("_", "-")
        text = f"{_explanation(field.name)} (default: {default})".replace("%", "%%")
        if field.type in ("bool", bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(option, dest=f"vcrd_{field.name}", default=default, help=text, action=action)
            continue
        group.add_argument(
            option,
            dest=f"vcrd_{field.name}",
            default=default,
            help=text,
            metavar=field.name.upper(),
            type=partial(_parse, field.name),
        )
    _mend_help(parser)
    return parser


def settings_from_args(
    args: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> DistillSettings:
    """The settings that the arguments of `add_vcrd_args` say; the secret from `environment`.
    Raises ValueError or TypeError that names a setting with a wrong value.
    """
    defaults = DistillSettings.from_environment(environment)
    given = {
        field.name: getattr(args, f"vcrd_{field.name}")
        for field, _ in _settings(defaults)
        if hasattr(args, f"vcrd_{field.name}")
    }
    return defaults.replaced(**given)


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Megatron's own texts have bare percent signs, at which --help would end with an error."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            action.help = action.help.replace("%", "%%")


def _settings(defaults: DistillSettings) -> list[tuple[Field, Any]]:
    both = [(field, defaults) for field in fields(DistillSettings)]
    both += [(field, defaults.link) for field in fields(LinkSettings)]
    return [(field, owner) for field, owner in both if field.name not in _NOT_ARGUMENTS]


def _parse(name: str, text: str) -> Any:
    """The value that the setting's variable would have with this text."""
    variable = f"VCRD_{name.upper()}"
    try:
        settings = DistillSettings.from_environment({variable: text})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"{variable}: ")) from None
    return getattr(settings.link if hasattr(settings.link, name) else settings, name)


def _explanation(name: str) -> str:
    """What the docstrings say of the setting `name`, in one line."""
    if name in _TEXTS:
        return _TEXTS[name]
    for source in _EXPLAINED_BY:
        text = _entry(source, name)
        if text:
            return text
    return f"See DistillSettings.{name}."


def _entry(source: Callable, name: str) -> str:
    """The entry "name: text" of a docstring; lines that are indented more belong to it."""
    found, depth = [], None
    for line in inspect.cleandoc(source.__doc__ or "").splitlines():
        indent = len(line) - len(line.lstrip())
        if depth is not None:
            if line.strip() and indent > depth:
                found.append(line.strip())
                continue
            break
        match = re.match(r"\s*((?:\w+, )*\w+): (.*)", line)
        if match and name in match[1].split(", "):
            depth, found = indent, [match[2]]
        # Two entries may share a line where both are short.
        elif inline := re.search(rf"\. {name}: (.*)", line):
            depth, found = indent, [inline[1]]
    return " ".join(found)
