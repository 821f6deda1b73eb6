"""The messages of docs/errors.md are those of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/errors.md").read_text()


def texts(folder: str) -> Iterator[str]:
    """Every literal text in the code of a folder, as Python joins it, and the fixed parts of f-strings."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def messages(section: str) -> list[str]:
    """The first cells of its table."""
    table = PAGE.split(f"\n## {section}\n")[1].split("\n|---|---|\n")[1].split("\n\n")[0]
    return [message for row in table.splitlines() for message in re.findall("`(.+?)`", row.split(" | ")[0])]


def missing(message: str, known: str) -> list[str]:
    """The fixed parts of a message that no source has. `expected` joins the first three, and ".." is a value."""
    pieces = re.split(r"(?<=\w): expected |^expected (?=the|one|a|nothing)|, got |\.\.(?!\.)", message)
    return [piece for piece in map(str.strip, filter(None, pieces)) if piece.strip(",") not in known]


@pytest.mark.parametrize(
    ("section", "folder", "least"),
    [("Messages of the link", "vcrd/link", 20), ("Messages of the plug", "vcrd", 25)],
)
def test_the_messages_are_those_of_the_sources(section, folder, least):
    known = "\n".join(texts(folder))
    found = messages(section)
    assert len(found) >= least
    for message in found:
        # The link puts some sentences together of several pieces.
        message = message.removesuffix(" at").removesuffix(" to") if folder == "vcrd/link" else message
        assert not missing(message, known), (message, missing(message, known))


def test_a_message_that_no_source_has_is_found():
    known = "\n".join(texts("vcrd"))
    assert not missing("fp8_recipe: expected 'tensorwise', 'blockwise' or 'mxfp8' for a teacher", known)
    assert missing("fp8_recipe: expected 'rowwise' for a teacher", known) == ["'rowwise' for a teacher"]
    assert missing("no_such_name: expected one", known) == ["no_such_name"]


def test_the_examples_have_the_form_of_the_package():
    from vcrd.errors import expected
    from vcrd.settings import DistillSettings

    (block,) = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    mask, credits = block.splitlines()
    assert mask == str(expected("mask", "shape [512]", [511]))
    with pytest.raises(ValueError) as error:
        DistillSettings.from_environment({"VCRD_CREDITS": "-1"})
    assert credits == str(error.value)


def test_every_error_of_the_link_is_on_the_page():
    for node in ast.parse((ROOT / "vcrd/link/errors.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            assert f"`vcrd.link.{node.name}`" in PAGE, node.name


def test_the_variables_exist():
    from vcrd.settings import NAMES, variable_of

    assert set(re.findall(r"VCRD_[A-Z_]*[A-Z]", PAGE)) <= set(map(variable_of, NAMES))
