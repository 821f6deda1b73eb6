"""The link between the ranks that will talk: which they are, what is measured, and when it is too slow."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from doctor_runs import Step, make_job

from vcrd.doctor import link, network
from vcrd.doctor.findings import INFO, OK, PROBLEM
from vcrd.doctor.link import Measurement, RankPair, pairs_of
from vcrd.doctor.processes import World
from vcrd.plan.costs import student_seconds
from vcrd.plan.scenario import GPUS, MODELS, Scenario
from vcrd.settings import LinkSettings

RUN = Scenario(
    teacher=MODELS["Qwen3-32B"],
    student=MODELS["Qwen3-4B"],
    teacher_gpu=GPUS["h100"],
    student_gpu=GPUS["h100"],
    replicas=1,
)


def ranks(payload: str = "float16", **changes) -> set[tuple[int, int]]:
    """Sender and receiver of each pair."""
    pairs = pairs_of(replace(RUN, **changes), payload)
    assert len({(pair.sender, pair.receiver) for pair in pairs}) == len(pairs)
    return {(pair.sender, pair.receiver) for pair in pairs}


def test_the_student_s_ranks_come_first_and_then_the_teacher_s():
    assert ranks() == {(1, 0)}
    # Two tensor ranks of the student, four of the teacher: each of the student's halves comes from two.
    assert ranks(student_tensor=2, teacher_tensor=4) == {(2, 0), (3, 0), (4, 1), (5, 1)}


def test_last_stages_talk_and_replicas_serve_their_own_data_ranks():
    # Student: tp 1, dp 2, pp 3, so ranks 4 and 5. Teacher: pp 2, replicas 2, so ranks 6 to 9, the last stage 8 and 9.
    assert ranks(student_data=2, student_pipeline=3, teacher_pipeline=2, replicas=2) == {(8, 4), (9, 5)}
    # One replica serves both.
    assert ranks(student_data=2, student_pipeline=3, teacher_pipeline=2) == {(7, 4), (7, 5)}


def test_context_ranks_get_each_their_own_and_whole_payloads_come_from_senders_in_turn():
    assert ranks(student_context=2, student_tensor=2) == {(4, 0), (4, 1), (4, 2), (4, 3)}
    assert ranks("hidden", student_context=2, student_tensor=2, teacher_tensor=2) == {
        (4, 0),
        (5, 1),
        (4, 2),
        (5, 3),
    }


def test_bytes_are_those_of_the_plan():
    from vcrd.link.payload import payload_named
    from vcrd.plan.costs import traffic_of

    run = replace(RUN, student_data=3, student_tensor=2, teacher_tensor=4, replicas=2)
    pairs, traffic = pairs_of(run, "float16"), traffic_of(run, payload_named("float16"))
    into = {r: sum(pair.bytes for pair in pairs if pair.receiver == r) for r in range(6)}
    assert max(into.values()) == traffic.into_busiest((run.sequence, run.batch))
    out = {s: sum(pair.bytes for pair in pairs if pair.sender == s) for s in {pair.sender for pair in pairs}}
    assert max(out.values()) == traffic.out_of_busiest((run.sequence, run.batch), 2)


def test_a_measurement_counts_what_arrived_and_leaves_no_thread():
    import threading

    pairs = [RankPair(0, 0, 1 << 20)]
    measurement = Measurement(pairs, 0, "sesame", "token")
    place = measurement.listen("127.0.0.1")
    assert measurement.connect({0: place}) == {}
    measurement.send(0.3)
    rates = measurement.rates(10)
    measurement.close()
    assert list(rates) == [0] and rates[0] > 1e6
    assert not [thread for thread in threading.enumerate() if thread.name == "vcrd-doctor-reader"]


def test_who_does_not_know_the_secret_or_the_measurement_is_refused():
    receiver = Measurement([RankPair(1, 0, 1 << 20)], 0, "sesame", "token")
    place = receiver.listen("127.0.0.1")
    for secret, token, said in (("other", "token", "secret differs"), ("sesame", "another", "")):
        sender = Measurement([RankPair(1, 0, 1 << 20)], 1, secret, token)
        failed = sender.connect({0: place})
        assert said in failed.get(0, "")
        sender.send(0.05)
        sender.close()
    assert receiver.rates(1) == {}
    receiver.close()


def judged(rates: dict, payload: str = "float16", known: bool = True, **changes):
    run = replace(RUN, **changes)
    job = make_job(World(), link=LinkSettings(payload=payload), scenario=run, models_known=known)
    names = {rank: f"rank {rank} (b{rank})" for rank in range(9)}
    return link.judge(job, pairs_of(run, payload), rates, names)


def test_a_link_on_which_a_micro_batch_takes_longer_than_the_compute_is_a_problem():
    (pair,) = pairs_of(RUN, "float16")
    enough = pair.bytes / student_seconds(RUN)
    got = judged({(1, 0): 1.01 * enough})
    assert got.status == OK and "from rank 1 (b1) to rank 0 (b0)" in got.found
    got = judged({(1, 0): 0.99 * enough})
    assert got.status == PROBLEM and got.found.endswith("so the student waits")
    assert re.fullmatch(r"Set VCRD_PAYLOAD=\w+ in both jobs, or use a faster network\.", got.fix)
    assert judged({(1, 0): 0.99 * enough}, known=False).status == OK


@pytest.mark.parametrize(
    ("setting", "version", "judges"),
    [("auto", "", True), ("auto", "2.28.9", False), ("nccl", "2.28.9", False), ("tcp", "2.28.9", True)],
)
def test_tcp_is_judged_where_the_run_uses_it(setting, version, judges, monkeypatch):
    (pair,) = pairs_of(RUN, "float16")
    monkeypatch.setattr(link, "nccl_version", lambda: (version, ""))
    job = make_job(World(), link=LinkSettings(transport=setting), scenario=RUN, models_known=True)
    slow = {(1, 0): 0.5 * pair.bytes / student_seconds(RUN)}
    got = link.judge(job, [pair], slow, {rank: f"rank {rank}" for rank in range(2)})
    assert got.status == (PROBLEM if judges else OK)
    assert ("(over TCP; the run will use NCCL, which was not measured)" in got.found) == (not judges)


@pytest.mark.parametrize(
    ("setting", "version", "why", "status", "found"),
    [
        ("auto", "2.28.9", "", OK, "NCCL 2.28.9 from GPU to GPU, if the other job has it too"),
        ("auto", "", "torch finds no GPU", INFO, "TCP: torch finds no GPU"),
        ("tcp", "2.28.9", "", INFO, "tcp, as set in VCRD_TRANSPORT"),
        ("nccl", "", "no binding", PROBLEM, "VCRD_TRANSPORT is nccl, but no binding"),
    ],
)
def test_how_tensors_would_travel_is_a_line(setting, version, why, status, found, monkeypatch):
    monkeypatch.setattr(network, "nccl_version", lambda: (version, why))
    (line,) = network.transport(make_job(World(), link=LinkSettings(transport=setting)))
    assert (line.name, line.status, line.found) == ("transport", status, found)
    assert bool(line.fix) == (status == PROBLEM)


def test_the_payload_that_is_proposed_is_the_plan_s():
    """At a twentieth of the needed speed only hidden states and top-k are fast enough."""
    (pair,) = pairs_of(RUN, "float16")
    slow = {(1, 0): pair.bytes / student_seconds(RUN) / 20}
    assert judged(slow).fix.startswith(("Set VCRD_PAYLOAD=hidden ", "Set VCRD_PAYLOAD=topk "))
    hopeless = {(1, 0): 1e3}
    assert judged(hopeless, payload="topk").fix == "Use a faster network: no other payload is faster here."


def test_the_slowest_of_several_pairs_is_named_and_silence_is_a_problem():
    rates = {pair: 1e9 * pair[1] + 1e9 for pair in ranks(student_tensor=2)}
    got = judged(rates, known=False, student_tensor=2)
    assert got.found.startswith(
        "1 GB/s from rank 2 (b2) to rank 0 (b0), the slowest of 2 pairs at once; 3 GB/s together"
    )
    got = judged(rates | {(2, 1): 0.0}, known=False, student_tensor=2)
    assert got.status == PROBLEM and "nothing arrived" in got.found and "to rank 1 (b1)" in got.found


def test_pairs_that_do_not_reach_each_other_are_one_line_for_each_reason():
    names = {rank: f"rank {rank} (b{rank})" for rank in range(4)}
    lines = link.unreachable(
        dict.fromkeys([(2, 0), (3, 0), (2, 1)], "timed out") | {(3, 1): "refused"}, names
    )
    assert [line.found for line in lines] == [
        "rank 2 (b2) does not reach rank 0 (b0) (and 2 other pairs): timed out",
        "rank 3 (b3) does not reach rank 1 (b1): refused",
    ]


def test_planned_ranks_of_real_processes_are_measured_and_one_that_cannot_listen_is_named():
    """A student of two tensor ranks and a teacher of one; then the same, and the second rank has a wrong interface."""
    options = ("--student", "tp=2", "--teacher", "tp=1", "--seconds", "0.5")
    got = Step(("b1", "b2", "b3"), *options).ended()[0]
    line = got.line("link")
    assert got.status == 0 and line["status"] == "ok", got
    assert re.match(
        r"\d\S* GB/s from rank 2 \(b3\) to rank [01] \(b[12]\), the slowest of 2 pairs at once", line["found"]
    )

    got = Step(("b1", "b2", "b3"), *options, each={1: {"variables": {"VCRD_INTERFACE": "ib7"}}}).ended()[0]
    assert got.status == 1
    line = got.line("link")
    assert line["found"].startswith(
        "rank 2 (b3) does not reach rank 1 (b2): interface: expected an IP address"
    )
    (line,) = [finding for finding in got.problems if finding["name"] == "link interface"]
    assert line["where"] == "b2"


def test_layouts_that_do_not_fit_the_processes_are_a_problem():
    got = Step(("b1", "b2"), "--student", "tp=2", "--teacher", "tp=2").ended()[0]
    line = got.line("link processes")
    assert (
        line["status"] == "problem" and line["found"] == "the layouts take 2 + 2 processes, but there are 2"
    )


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (6, 1), (8, 2), (12, 4), (99, 4)])
def test_replicas_fill_the_processes_where_nothing_was_said(size, replicas):
    run = replace(RUN, student_data=4, teacher_tensor=2, replicas=None)
    assert link.with_replicas(run, size).replicas == replicas
