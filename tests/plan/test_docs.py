"""The examples of docs/planning.md equal the output of the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vcrd.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
EXAMPLES = re.findall(r"```console\n\$ python -m vcrd (.*?[^\\])\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_equals_the_output_of_the_command(capsys, command, output):
    assert main(shlex.split(command.replace("\\\n", ""))) == 0
    assert capsys.readouterr().out == output


def test_there_are_two_examples():
    assert len(EXAMPLES) == 2
