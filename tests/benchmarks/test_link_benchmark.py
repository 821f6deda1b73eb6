"""The benchmark of the link with small sizes: its arithmetic, its record, and its trace of both jobs."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

import link

STEPS, CREDITS = 9, 2
SIZES = [
    "--tokens",
    "64",
    "--vocab",
    "1024",
    "--state-size",
    "16",
    "--top-k",
    "8",
    "--matmuls",
    "1",
    "--sockets",
    "2",
]


def test_the_steady_part_is_between_the_first_and_the_last_steps():
    marks = [0.0, 5.0, 9.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.5, 99.0]
    assert link.steady(marks, credits=2) == 1.0


def test_limits_compare_the_medians_of_rounds():
    slow = {"ready": [1.0, 1.0, 2.0], "linked": [1.2, 1.0, 2.4]}
    fast = {"ready": [1.0, 1.0, 2.0], "linked": [1.05, 3.0, 2.1]}
    flow = {"linked": [0.7, 0.83, 1.0], "bare": [1.0, 1.0, 1.0]}
    found = link.limits({"float16": slow, "topk": fast}, {"float16": flow, "float32": flow, "topk": flow})
    assert [(round(one["reached"], 3), one["passed"]) for one in found] == [
        (1.2, False),
        (1.05, True),
        (0.83, True),
        (0.83, False),
    ]


def test_too_few_steps_are_an_error(capsys):
    with pytest.raises(SystemExit):
        link.parse(["--steps", "6"])
    assert "--steps must be at least 7, got 6" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The files of a short run of the whole benchmark. Limits may fail, so the exit status does not matter."""
    folder = tmp_path_factory.mktemp("link")
    command = [*SIZES, "--rounds", "1", "--steps", str(STEPS), "--json", str(folder / "out.json")]
    assert link.main([*command, "--trace", str(folder / "trace")]) in (0, 1)
    return folder


def test_every_payload_is_measured(measured):
    record = json.loads((measured / "out.json").read_text())
    assert list(record["overlap"]) == list(record["throughput"]) == list(link.PAYLOADS)
    for of in record["overlap"].values():
        assert all(len(of[key]) == 1 for key in ("ready", "linked", "waited", "student_cpu", "teacher_cpu"))
        assert min(of["ready"] + of["linked"]) > 0
    assert all(min(of["linked"] + of["bare"]) > 0 for of in record["throughput"].values())
    assert len(record["limits"]) == len(link.PAYLOADS) + len(link.LEAST_THROUGHPUT)


@pytest.fixture(scope="module")
def ranges(measured):
    """process -> range -> {micro-batch: [(begin, end, thread)]}, in microseconds on one clock."""
    events = json.loads((measured / "trace" / "both.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for event in events:
        what, _, number = event["name"].removeprefix("vcrd.link ").rpartition(" ")
        if event.get("cat") == "user_annotation" and number.isdigit():
            times = (event["ts"], event["ts"] + event["dur"], event["tid"])
            found[names[event["pid"]]][what][int(number)].append(times)
    return found


def test_the_trace_names_both_processes_and_their_threads(measured):
    events = json.loads((measured / "trace" / "both.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] in ("process_name", "thread_name")}
    assert {"student", "teacher", "MainThread", "vcrd-link-reader", "vcrd-link-writer"} <= names


def test_the_trace_shows_the_link_in_its_own_threads(ranges):
    for process, what in (("student", "receive"), ("teacher", "send")):
        own = {thread for of in ranges[process][what].values() for _, _, thread in of}
        main = {thread for of in ranges[process]["compute"].values() for _, _, thread in of}
        assert own and not own & main
    for process, what in (
        ("student", "request"),
        ("student", "wait"),
        ("student", "receive"),
        ("teacher", "encode"),
    ):
        assert len(ranges[process][what]) == STEPS
    # The teacher's trace ends when it has passed on its last answer, which may not be sent yet.
    assert len(ranges["teacher"]["send"]) in (STEPS - 1, STEPS)


def test_the_teacher_computes_the_next_micro_batches_while_the_student_trains(ranges):
    training, teaching = ranges["student"]["compute"], ranges["teacher"]["compute"]
    assert len(training) == len(teaching) == STEPS
    inner = range(1, STEPS - CREDITS - 1)  # at the end there is nothing more to request
    ahead = []
    for number in inner:
        ((begin, end, _),) = training[number]
        at_work = [n for n, ((b, e, _),) in teaching.items() if b < end and e > begin]
        assert all(n > number for n in at_work), "an answer was used before it arrived"
        assert all(n <= number + CREDITS for n in at_work), (
            "more micro-batches were requested than the credits allow"
        )
        ahead += [number] * bool(at_work)
    assert len(ahead) > len(inner) / 2
