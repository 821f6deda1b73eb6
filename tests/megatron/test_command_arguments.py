"""The settings as command-line arguments."""

from __future__ import annotations

import argparse

import pytest

from vcrd.megatron import DistillSettings
from vcrd.megatron.arguments import add_vcrd_args, settings_from_args
from vcrd.settings import LinkSettings


def parse(text: str = "", environment: dict | None = None) -> DistillSettings:
    environment = environment or {}
    parser = add_vcrd_args(argparse.ArgumentParser(), environment)
    return settings_from_args(parser.parse_args(text.split()), environment)


def test_arguments_stand_over_the_environment_and_this_over_the_defaults():
    assert parse() == DistillSettings()
    environment = {"VCRD_SHARPNESS": "2", "VCRD_CREDITS": "5", "VCRD_SECRET": "hush", "VCRD_VOCAB_SIZE": "3"}
    found = parse("--vcrd-sharpness 3 --vcrd-vocab-size none --vcrd-payload topk", environment)
    link = LinkSettings(credits=5, secret="hush", payload="topk")
    assert found == DistillSettings(sharpness=3.0, vocab_size=None, link=link)


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
        ("--vcrd-vocab-size 0", "argument --vcrd-vocab-size: expected an integer of at least 1"),
        ("--vcrd-secret hush", "unrecognized arguments: --vcrd-secret"),
    ],
)
def test_a_wrong_argument_is_one_sentence(text, sentence, capsys):
    parser = add_vcrd_args(argparse.ArgumentParser(allow_abbrev=False), {})
    with pytest.raises(SystemExit):
        parser.parse_args(text.split())
    assert sentence in capsys.readouterr().err
