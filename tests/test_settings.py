"""Every setting is defined once; the environment, the arguments and the page of settings follow from it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vcrd.link.payload import PAYLOADS
from vcrd.megatron.arguments import add_vcrd_args, settings_from_args
from vcrd.settings import (
    NAMES,
    DistillSettings,
    LinkSettings,
    argument_of,
    help_table,
    help_text,
    is_argument,
    variable_of,
)
from vcrd.settings import PAYLOADS as PAYLOAD_NAMES

ROOT = Path(__file__).resolve().parents[1]
# A value of each setting that is not its default.
OTHER = dict(
    divergence="jsd",
    temperature=2.0,
    alpha=0.2,
    beta=0.4,
    validity="margin",
    weighting="gap",
    sharpness=2.0,
    floor=0.5,
    ceiling=1.5,
    normalization="mean",
    ce_weight=0.3,
    teacher_weights="math=1",
    teacher_mixture="math=1",
    invalid_rows="stop",
    fused_head="recompute",
    vocab_size=7,
    sequence_length=9,
    telemetry_dir="/records",
    address="file:/a",
    teacher="cache:/a",
    interface="ib0",
    payload="hidden",
    top_k=3,
    transport="tcp",
    sockets=4,
    credits=0,
    teacher_context_length=5,
    timeout=5.0,
    connect_timeout=6.0,
    name="run",
    identity="warn",
    secret="hush",
    secret_file="/secret",
)


def test_a_setting_is_defined_once():
    own, link = ({each.name for each in fields(kind)} for kind in (DistillSettings, LinkSettings))
    assert own & link == set() and (own - {"link"}) | link == set(NAMES) == set(OTHER)
    assert PAYLOAD_NAMES == tuple(payload.name for payload in PAYLOADS)


@pytest.mark.parametrize(
    "given, teachers",
    [
        ({}, [("", "127.0.0.1:29600", None)]),
        ({"teacher": "cache:/a"}, [("", None, "/a")]),
        ({"teacher": "cache:/a", "address": "file:/b=c,d"}, [("", "file:/b=c,d", "/a")]),
        (
            {"address": "math=h:1,code=cache:/b", "teacher": "math=cache:/a,law=cache:/c"},
            [("math", "h:1", "/a"), ("code", None, "/b"), ("law", None, "/c")],
        ),
    ],
)
def test_the_teachers_of_a_student(given, teachers):
    variables = {variable_of(name): text for name, text in given.items()}
    assert list(DistillSettings.from_environment(variables).link.teachers()) == teachers


@pytest.mark.parametrize(
    "given, why",
    [
        ({"teacher": "cache:a"}, "VCRD_TEACHER .*: expected cache:/absolute/path, .* got 'cache:a'"),
        ({"teacher": "math=h:1"}, "VCRD_TEACHER .* got 'math=h:1'"),
        ({"address": "math=h:1,math=h:2"}, "VCRD_ADDRESS .* got 'math=h:1,math=h:2'"),
        ({"address": "math=h:1,h:2"}, "VCRD_ADDRESS .* got 'math=h:1,h:2'"),
        (
            {"address": "math=h:1", "teacher": "cache:/a"},
            "VCRD_TEACHER .*: expected names like those of the address",
        ),
        (
            {"address": "math=cache:/b", "teacher": "math=cache:/a"},
            "VCRD_ADDRESS .*: expected host:port or file:/path where `teacher` names the cache",
        ),
    ],
)
def test_teachers_that_cannot_be_told_apart_are_refused(given, why):
    with pytest.raises(ValueError, match=why):
        LinkSettings(**given)


TWO = "math=h:1,code=h:2"


@pytest.mark.parametrize(
    "given, found",
    [
        ({}, [("float16", 64), ("float16", 64)]),
        ({"payload": "topk", "top_k": 8}, [("topk", 8), ("topk", 8)]),
        ({"payload": "math=topk,code=float32", "top_k": "math=8"}, [("topk", 8), ("float32", 64)]),
        ({"payload": "code=hidden", "top_k": "code=8,math=9"}, [("float16", 9), ("hidden", 8)]),
    ],
)
def test_each_teacher_may_have_a_payload_of_its_own(given, found):
    variables = {variable_of(name): str(text) for name, text in {"address": TWO, **given}.items()}
    link = DistillSettings.from_environment(variables).link
    own = [link.of(source) for source in link.teachers()]
    assert [(each.payload, each.top_k) for each in own] == found
    assert [each.rendezvous for each in own] == ["h:1", "h:2"]
    with pytest.raises(ValueError, match="VCRD_ADDRESS .*: expected one address without names here"):
        _ = link.rendezvous


def test_the_weight_of_a_teacher():
    chosen = DistillSettings().replaced(address=TWO, teacher_weights="code=0.5")
    assert [chosen.weight_of(name) for name in ("math", "code")] == [1.0, 0.5]
    assert DistillSettings().weight_of("") == 1.0


@pytest.mark.parametrize(
    "given, why",
    [
        (
            {"payload": "law=topk"},
            r"VCRD_PAYLOAD .*: expected the names of teachers .* \(math, code\), got 'law'",
        ),
        ({"payload": "math=zip"}, "VCRD_PAYLOAD .* of math: expected one of float16, .* got 'zip'"),
        (
            {"payload": "math=topk,math=topk"},
            "VCRD_PAYLOAD .*: expected name=value,name=value, each teacher once",
        ),
        ({"top_k": "math=x"}, "VCRD_TOP_K .* of math: expected an integer, got 'x'"),
        ({"top_k": "math=0"}, "VCRD_TOP_K .* of math: expected an integer of at least 1, got 0"),
        (
            {"teacher_weights": "law=1"},
            "VCRD_TEACHER_WEIGHTS .*: expected the names of teachers .* got 'law'",
        ),
        ({"teacher_weights": "0.5"}, "VCRD_TEACHER_WEIGHTS .*: expected name=value,name=value"),
        ({"teacher_weights": "math:1"}, "VCRD_TEACHER_WEIGHTS .*: expected name=value,name=value"),
        (
            {"teacher_weights": "math=0"},
            "VCRD_TEACHER_WEIGHTS .* of math: expected a finite number above 0, got 0",
        ),
        ({"teacher_weights": "math=much"}, "VCRD_TEACHER_WEIGHTS .* of math: expected a number, got 'much'"),
        ({"address": "math=h:1,code=h:1"}, "VCRD_ADDRESS .*: expected another address for each teacher"),
        (
            {"teacher": "math=cache:/a,code=cache:/a/"},
            "VCRD_TEACHER .*: expected another cache for each teacher, got 'math=cache:/a,",
        ),
        (
            {"payload": "code=topk", "temperature": 2.0},
            "VCRD_TEMPERATURE .*: expected 1 with the payload topk",
        ),
        (
            {"payload": "code=topk", "normalization": "mean"},
            "VCRD_NORMALIZATION .*: expected none where teachers",
        ),
        (
            {"payload": "hidden", "normalization": "mass"},
            "VCRD_NORMALIZATION .*: expected none where teachers .*, got mass",
        ),
        (
            {"payload": "topk", "top_k": "code=8", "weighting": "gap"},
            "VCRD_WEIGHTING .*: expected sigmoid where teachers answer in several forms, .*, got gap",
        ),
    ],
)
def test_a_value_by_teacher_that_means_nothing_is_refused(given, why):
    variables = {variable_of(name): str(text) for name, text in {"address": TWO, **given}.items()}
    with pytest.raises(ValueError, match=why):
        DistillSettings.from_environment(variables)


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_comes_from_its_variable_and_from_its_argument(name):
    value = OTHER[name]
    # The weights are those of teachers that have an address.
    needed = {"VCRD_ADDRESS": "math=h:1"} if name in ("teacher_weights", "teacher_mixture") else {}
    assert DistillSettings().value(name) != value
    assert DistillSettings.from_environment({**needed, variable_of(name): str(value)}).value(name) == value
    if is_argument(name):
        parser = add_vcrd_args(argparse.ArgumentParser(), needed)
        given = parser.parse_args([argument_of(name), str(value)])
        assert settings_from_args(given, needed).value(name) == value
        assert help_text(name).split()[0] in parser.format_help()


def test_the_page_is_that_table():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page.endswith("\n\n" + help_table()), "python -m vcrd.settings makes the table of docs/settings.md"


@pytest.mark.parametrize(
    "name, shown",
    [
        ("sockets", "integer from 1 to 16"),
        ("vocab_size", "integer of at least 1, or none"),
        ("timeout", "number above 0"),
        ("sharpness", "number, or none"),
        ("fused_head", "`off`, `on`, `recompute`"),
        ("top_k", "integer of at least 1; or by teacher"),
        ("telemetry_dir", "path, or none"),
    ],
)
def test_the_page_shows_the_type_and_the_meaning_of_a_setting(name, shown):
    (row,) = [row for row in help_table().splitlines() if row.startswith(f"| `{variable_of(name)}` |")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[2] == shown and cells[4] == help_text(name) and len(cells) == 5


def test_settings_import_neither_torch_nor_megatron():
    script = "import sys, vcrd.settings; print({'torch', 'megatron', 'vcrd.link'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr
