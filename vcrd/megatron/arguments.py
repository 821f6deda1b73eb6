"""The settings as command-line arguments, next to Megatron's own: `--vcrd-sharpness 2`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from vcrd.settings import NAMES, DistillSettings, argument_of, check, help_text, is_argument, label, parse


def add_vcrd_args(
    parser: argparse.ArgumentParser, environment: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """Adds the group `--vcrd-*`, one argument for each setting, and returns the parser: an `extra_args_provider`.

    Each setting of `vcrd.settings` is an argument except `secret`, which comes from a file (`--vcrd-secret-file`) or
    from VCRD_SECRET. Defaults are the VCRD_* variables of `environment` (default: the process's). Raises ValueError or
    TypeError for a variable that is no setting or has a wrong value.
    """
    defaults = DistillSettings.from_environment(environment)
    group = parser.add_argument_group(
        "vcrd", "Distillation. Defaults come from the environment: VCRD_SHARPNESS for --vcrd-sharpness."
    )
    for name in filter(is_argument, NAMES):
        default = defaults.value(name)
        group.add_argument(
            argument_of(name),
            dest=f"vcrd_{name}",
            default=default,
            help=f"{help_text(name)} (default: {default})".replace("%", "%%"),
            metavar=name.upper(),
            type=partial(_parse, name),
        )
    _escape_percent_signs(parser)
    return parser


def settings_from_args(
    args: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> DistillSettings:
    """The settings that the arguments of `add_vcrd_args` say; the secret from `environment`.
    Raises ValueError or TypeError that names a setting with a wrong value.
    """
    given = {name: getattr(args, f"vcrd_{name}") for name in NAMES if hasattr(args, f"vcrd_{name}")}
    return DistillSettings.from_environment(environment, **given)


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    """Megatron's own help texts have bare percent signs, which would end --help with an error."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            action.help = action.help.replace("%", "%%")


def _parse(name: str, text: str) -> Any:
    try:
        value = parse(name, text)
        check(name, value)
    except (TypeError, ValueError) as error:
        # argparse names the argument itself.
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"{label(name)}: ")) from None
    return value
