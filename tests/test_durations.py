"""The table of `make test-durations`."""

from __future__ import annotations

from xml.etree import ElementTree

import durations

RUN = """
<testsuites><testsuite time="7.4">
  <testcase classname="tests.link.test_plan" name="test_columns[1]" time="0.5"/>
  <testcase classname="tests.link.test_wire" name="test_slow" time="3.2"/>
  <testcase classname="tests.loss.test_rows" name="test_rows" time="4.0"/>
  <testcase classname="tests.test_layers" name="test_lengths" time="0.1"/>
</testsuite></testsuites>
"""


def test_folders_are_sorted_by_time_with_their_slowest_tests():
    assert durations.table(ElementTree.fromstring(RUN).find("testsuite")).splitlines() == [
        "| folder | tests | seconds | slowest |",
        "|---|---|---|---|",
        "| loss | 1 | 4 | `test_rows::test_rows` 4 |",
        "| link | 2 | 4 | `test_wire::test_slow` 3 |",
        "| . | 1 | 0 |  |",
        "| all | 4 | 8 | the run took 7 |",
    ]


def test_without_a_run_it_says_what_to_do(tmp_path, capsys):
    assert durations.main(tmp_path / "none.xml") == 1
    assert "run `make test` first" in capsys.readouterr().err
