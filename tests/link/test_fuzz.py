"""Random, damaged and truncated input on every way in: never a crash, never a hang, never memory beyond the limit.

fuzz.py runs the same for as long as one likes.
"""

from __future__ import annotations

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SOME = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
MANY = settings(SOME, max_examples=6 * SOME.max_examples)  # of what opens no connection


@pytest.fixture(scope="module")
def peers():
    peers = fuzzing.Peers()
    yield peers
    peers.close()


@MANY
@given(st.one_of(fuzzing.header_bytes(), st.binary(max_size=100)))
def test_any_bytes_are_a_header_or_are_refused(raw):
    fuzzing.parse_anything(raw)


@MANY
@given(
    st.sampled_from([fuzzing.TEACHER, fuzzing.HIDDEN]).flatmap(
        lambda handshake: fuzzing.mutated(handshake.plain())
    )
)
def test_any_json_is_a_statement_or_is_refused(value):
    fuzzing.read_facts(value)


@MANY
@given(st.one_of(st.binary(max_size=200), st.text(max_size=50).map(str.encode), st.just(b"[" * 50000)))
def test_any_text_of_a_greeting_is_read_or_refused(text):
    fuzzing.read_text(text)


@SOME
@given(fuzzing.stranger_hellos())
def test_a_stranger_may_say_anything(peers, stream):
    peers.greet_badly(stream)


@SOME
@given(fuzzing.hellos())
def test_the_rendezvous_may_be_asked_anything(peers, hello):
    peers.ask_rendezvous(hello)


@SOME
@given(st.lists(st.tuples(fuzzing.hellos(), fuzzing.streams), min_size=1, max_size=4))
def test_a_student_rank_may_be_asked_and_told_anything(hellos):
    fuzzing.knock(hellos)


@SOME
@given(fuzzing.greetings())
def test_what_answers_may_be_anything(stream):
    fuzzing.ask_liar(stream)


@SOME
@given(fuzzing.replies)
def test_the_rendezvous_may_reply_anything(reply):
    fuzzing.ask_fool(reply)


@SOME
@given(st.booleans(), fuzzing.streams)
def test_a_student_may_request_anything(well_begun, stream):
    fuzzing.request_anything(fuzzing.good_stream * well_begun + stream)


@SOME
@given(fuzzing.streams, st.integers(0, 2))
def test_a_teacher_may_respond_anything(stream, asked):
    fuzzing.respond_anything(stream, asked)


@SOME
@given(fuzzing.streams)
def test_a_student_may_say_anything_to_a_sender(stream):
    fuzzing.tell_sender_anything(stream)
