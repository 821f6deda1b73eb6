"""The one style of error, and the checks that the whole package shares."""

from __future__ import annotations

import math

import pytest

from vcrd.errors import check_bool, check_choice, check_integer, check_number, expected, wrong_type


def test_the_style():
    assert str(expected("mask", "shape [3]", [2])) == "mask: expected shape [3], got [2]"
    assert isinstance(expected("steps", "integers", "float32", TypeError), TypeError)
    assert str(wrong_type("mask", "a tensor", [1])) == "mask: expected a tensor, got list"


@pytest.mark.parametrize(
    ("check", "error", "sentence"),
    [
        (lambda: check_choice("x", "c", ("a", "b")), ValueError, "one of a, b, got 'c'"),
        (lambda: check_choice("x", ["a"], ("a", "b")), ValueError, "one of a, b, got \\['a'\\]"),
        (lambda: check_bool("x", 1), TypeError, "True or False, got 1"),
        (lambda: check_integer("x", True, 1), TypeError, "an integer, got bool"),
        (lambda: check_integer("x", 1.0, 1, optional=True), TypeError, "an integer or None, got float"),
        (lambda: check_integer("x", 0, 1), ValueError, "an integer of at least 1, got 0"),
        (lambda: check_integer("x", 2, most=1), ValueError, "an integer of at most 1, got 2"),
        (lambda: check_integer("x", 17, 1, 16), ValueError, "an integer from 1 to 16, got 17"),
        (lambda: check_number("x", False), TypeError, "a number, got bool"),
        (lambda: check_number("x", "1", optional=True), TypeError, "a number or None, got str"),
        (lambda: check_number("x", math.nan), ValueError, "a finite number, got nan"),
        (lambda: check_number("x", -math.inf, most=1), ValueError, "a finite number of at most 1, got -inf"),
        (lambda: check_number("x", math.inf, above=0), ValueError, "a finite number above 0, got inf"),
        (lambda: check_number("x", 0, above=0), ValueError, "a finite number above 0, got 0"),
        (lambda: check_number("x", -1, least=0), ValueError, "a finite number of at least 0, got -1"),
        (lambda: check_number("x", 1, least=0, below=1), ValueError, "a number in \\[0, 1\\), got 1"),
        (lambda: check_number("x", 10**400, above=0, most=1), ValueError, "a number in \\(0, 1\\], got 1000"),
    ],
)
def test_what_is_wrong_is_named(check, error, sentence):
    with pytest.raises(error, match=f"^x: expected {sentence}"):
        check()


def test_what_is_right_passes():
    check_choice("x", "a", ("a", "b"))
    check_bool("x", False)
    check_integer("x", 1, 1, 1)
    check_integer("x", None, 1, optional=True)
    check_number("x", 0, least=0, most=0)
    check_number("x", None, above=0, optional=True)
