"""The examples and the table of docs/planning.md equal the output of the command."""

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


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


IDLE = re.findall(r"^\| `(Qwen3-32B,[^`]*)` \| (.*?) \|$", PAGE.read_text(), re.M)


def test_the_table_of_idle_teachers_equals_the_output_of_the_command(capsys):
    student = re.search(r"`(Qwen3-4B,[^`]*)` on 16 GPUs", PAGE.read_text())[1]
    assert len(IDLE) == 5
    for teacher, cells in IDLE:
        options, best, gpus, waits, idle, step, cost = (cell.strip("`") for cell in cells.split(" | "))
        options = [] if options == "-" else options.split()
        assert main(["plan", "--teacher", teacher, "--student", student, *options]) == 0
        text = capsys.readouterr().out
        assert f"best: {best}, {gpus} teacher GPUs" in text
        assert (
            f"GPU seconds of a step: {cost} (16 student GPUs, {gpus} teacher GPUs, idle {idle} of the time)"
            in text
        )
        row = next(line for line in text.split("\npayload ")[2].splitlines() if line.startswith(f"{best} "))
        assert re.split(r" {2,}", row)[6:8] == [waits, step]
    assert f"it would be {re.search(r'ranks: ([0-9.]+)', text)[1]}, as the plan says" in PAGE.read_text()
