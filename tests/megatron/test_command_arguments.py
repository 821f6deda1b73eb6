"""The settings as command-line arguments."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from vcrd.link.settings import LinkSettings
from vcrd.megatron import DistillSettings
from vcrd.megatron.arguments import add_vcrd_args, settings_from_args


def parse(text: str = "", environment: dict | None = None) -> DistillSettings:
    environment = environment or {}
    parser = add_vcrd_args(argparse.ArgumentParser(), environment)
    return settings_from_args(parser.parse_args(text.split()), environment)


def test_arguments_stand_over_the_environment_and_this_over_the_defaults():
    assert parse() == DistillSettings()
    environment = {"VCRD_SHARPNESS": "2", "VCRD_CREDITS": "5", "VCRD_SECRET": "hush", "VCRD_AHEAD": "3"}
    found = parse("--vcrd-sharpness 3 --vcrd-ahead none --vcrd-payload topk --vcrd-steps", environment)
    link = LinkSettings(credits=5, secret="hush", payload="topk")
    assert found == DistillSettings(sharpness=3.0, ahead=None, steps=True, link=link)
    assert not parse("--no-vcrd-steps", {"VCRD_STEPS": "true"}).steps


def test_every_setting_but_the_secret_is_an_argument_that_says_what_it_does():
    parser = add_vcrd_args(argparse.ArgumentParser(), {})
    found = {action.dest: action for action in parser._actions if action.dest.startswith("vcrd_")}
    names = {field.name for kind in (DistillSettings, LinkSettings) for field in fields(kind)}
    assert set(found) == {f"vcrd_{name}" for name in names - {"link", "secret"}}
    assert not [name for name, action in found.items() if action.help.startswith("See ")]


def test_help_survives_bare_percent_signs_of_others():
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", help="100% (or 5%) of it")
    parser.add_argument("--good", default=3, help="50%% of %(default)s")
    text = add_vcrd_args(parser, {}).format_help()
    assert "100% (or 5%) of it" in text and "50% of 3" in text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("--vcrd-credits two", "argument --vcrd-credits: expected an integer, got 'two'"),
        ("--vcrd-payload smoke", "argument --vcrd-payload: "),
        ("--vcrd-vocab-size 0", "argument --vcrd-vocab-size: vocab_size: expected an integer of at least 1"),
        ("--vcrd-secret hush", "unrecognized arguments: --vcrd-secret"),
    ],
)
def test_a_wrong_argument_is_one_sentence(text, sentence, capsys):
    parser = add_vcrd_args(argparse.ArgumentParser(allow_abbrev=False), {})
    with pytest.raises(SystemExit):
        parser.parse_args(text.split())
    assert sentence in capsys.readouterr().err
