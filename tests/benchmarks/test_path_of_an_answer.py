"""The list of functions that an answer passes through: it has both processes, every thread of the way, and an order."""

from __future__ import annotations

import json

import pytest

import path_of_an_answer

# Each of them happens after the one before it, in the thread that the docstring of vcrd/link/__init__.py names.
WAY = [
    ("student", "MainThread", "StudentLink.receive"),
    ("teacher", "MainThread", "TeacherLink.respond"),
    ("teacher", "MainThread", "encode"),
    ("teacher", "vcrd-link-writer", "Transport.send"),
    ("student", "vcrd-link-reader", "Reassembly.receive_piece"),
    ("student", "vcrd-link-reader", "Transport.receive"),
    ("student", "MainThread", "validity_calibrated_kl"),
    ("student", "MainThread", "_VocabParallelDivergence.backward"),
]


@pytest.mark.parametrize("transport", ["tcp", "fake"])
def test_the_list_follows_one_answer_through_both_processes(tmp_path, capsys, transport):
    file = tmp_path / "path.json"
    assert path_of_an_answer.main(["--transport", transport, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    found = [(call["process"], call["thread"], call["function"]) for call in record["calls"]]
    places = [found.index(step) for step in WAY]
    assert places == sorted(places)
    assert f"{record['functions']} functions in {record['files']} files" in capsys.readouterr().out


def test_a_function_of_two_threads_is_counted_once():
    call = dict(process="student", thread="MainThread", file="vcrd/a.py", function="f", seconds=0.0)
    calls = [call, {**call, "thread": "reader"}, {**call, "function": "g"}, {**call, "file": "vcrd/b.py"}]
    assert path_of_an_answer.counts(calls) == {"functions": 3, "files": 2}
