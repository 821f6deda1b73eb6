"""One style of error for arguments and settings, `name: expected ..., got ...`, and the checks that most of them need.

A value of the wrong type is a TypeError that shows its type. A value that is out of range is a ValueError that shows
the value. Each check returns None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class OptionError(ValueError):
    """A wrong option of a command. Its message is all that the user sees."""


def expected(name: str, what: str, got: object, error: type[Exception] = ValueError) -> Exception:
    """The error to raise for the argument `name`. `got` is text, or a value whose text says enough."""
    return error(f"{name}: expected {what}, got {got}")


def wrong_type(name: str, what: str, value: object) -> TypeError:
    """The error to raise where `value` is not of a type that the argument `name` may have."""
    return TypeError(f"{name}: expected {what}, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of these names."""
    if not isinstance(value, str) or value not in choices:
        raise expected(name, f"one of {', '.join(choices)}", repr(value))


def check_bool(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise expected(name, "True or False", repr(value), TypeError)


def check_integer(
    name: str, value: object, least: int | None = None, most: int | None = None, optional: bool = False
) -> None:
    """Raises TypeError unless `value` is an int and no bool, and ValueError unless it is from `least` to `most`.

    optional: None is right too.
    """
    if optional and value is None:
        return
    or_none = " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, f"an integer{or_none}", value)
    if (least is not None and value < least) or (most is not None and value > most):
        if most is None:
            span = f"of at least {least}"
        elif least is None:
            span = f"of at most {most}"
        else:
            span = f"from {least} to {most}"
        raise expected(name, f"an integer {span}{or_none}", value)


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> None:
    """Raises TypeError unless `value` is an int or a float and no bool; ValueError unless it is finite and in range.

    least, most: bounds that the value may have. above, below: bounds that it may not have. optional: None is right too.
    """
    if optional and value is None:
        return
    or_none = " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(name, f"a number{or_none}", value)
    if not (least <= value <= most and above < value < below):
        raise expected(name, f"{_range(least, above, most, below)}{or_none}", value)


def _range(least: float, above: float, most: float, below: float) -> str:
    """In words: "a finite number above 0", "a number in [0, 1)"."""
    low = f"[{least}" if least > above else f"({above}"
    high = f"{most}]" if most < below else f"{below})"
    bounded = math.isfinite(max(least, above)), math.isfinite(min(most, below))
    if all(bounded):
        return f"a number in {low}, {high}"
    if bounded[0]:
        return f"a finite number of at least {least}" if least > above else f"a finite number above {above}"
    if bounded[1]:
        return f"a finite number of at most {most}" if most < below else f"a finite number below {below}"
    return "a finite number"
