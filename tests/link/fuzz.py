"""The long run of test_fuzz.py: random, damaged and truncated input on every way into the link.

    PYTHONPATH=. python tests/link/fuzz.py --minutes 10

Prints how many trials of each kind ran; exit status 1, with the smallest input that shows it, at the first crash, hang
or allocation beyond the limit.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import fuzzing
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

AT_ONCE = 100  # trials of one kind before the next kind's turn
SLOW = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
]


def trials(peers: fuzzing.Peers) -> dict[str, tuple[Callable, st.SearchStrategy]]:
    statements = st.sampled_from([fuzzing.TEACHER, fuzzing.HIDDEN, fuzzing.STUDENT, fuzzing.WIDE])
    requests = st.tuples(st.booleans(), fuzzing.streams).map(
        lambda pair: fuzzing.good_stream * pair[0] + pair[1]
    )
    responses = st.tuples(fuzzing.streams, st.integers(0, 2))
    knocks = st.lists(st.tuples(fuzzing.hellos(), fuzzing.streams), min_size=1, max_size=6)
    return {
        "header": (fuzzing.parse_anything, st.one_of(fuzzing.header_bytes(), st.binary(max_size=100))),
        "statement": (
            fuzzing.read_facts,
            statements.flatmap(lambda handshake: fuzzing.mutated(handshake.plain())),
        ),
        "text of a greeting": (fuzzing.read_text, st.one_of(st.binary(), st.text().map(str.encode))),
        "stranger at a listener": (peers.greet_badly, fuzzing.stranger_hellos()),
        "question to the rendezvous": (peers.ask_rendezvous, fuzzing.hellos()),
        "knocks at a student rank": (fuzzing.knock, knocks),
        "stranger who answers": (fuzzing.ask_liar, fuzzing.greetings()),
        "reply of the rendezvous": (fuzzing.ask_fool, fuzzing.replies),
        "requests": (fuzzing.request_anything, requests),
        "responses": (lambda pair: fuzzing.respond_anything(*pair), responses),
        "words to a sender": (fuzzing.tell_sender_anything, fuzzing.streams),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--seed", type=int, default=None, help="to repeat a run; default: another one each time"
    )
    given_seed = parser.parse_args()
    number = random.SystemRandom().randrange(1 << 32) if given_seed.seed is None else given_seed.seed
    print(f"seed {number}", flush=True)
    log = logging.getLogger("vcrd")
    log.propagate = False  # each stranger has its warning
    log.addHandler(Complaints())
    deadline, counts = time.monotonic() + 60 * given_seed.minutes, {}
    peers = fuzzing.Peers()
    try:
        kinds = trials(peers)
        while time.monotonic() < deadline:
            for name, (trial, strategy) in kinds.items():
                number += 1
                counts[name] = counts.get(name, 0) + run(trial, strategy, number)
                if time.monotonic() > deadline:
                    break
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    finally:
        peers.close()
    for name, count in counts.items():
        print(f"{count:9} {name}")
    print(f"{sum(counts.values()):9} trials; {files} descriptors and {threads} threads at the end")
    return 0


class Complaints(logging.Handler):
    """What the link logs as an exception of its own is a crash that it has survived: it counts."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            print(f"the link logged {record.getMessage()}: {record.exc_info[1]!r}", file=sys.stderr)
            os._exit(1)


def run(trial: Callable, strategy: st.SearchStrategy, number: int) -> int:
    """How many trials were run; raises what one of them raised, for the smallest input that does."""
    count = 0

    @seed(number)
    @settings(max_examples=AT_ONCE, deadline=None, database=None, suppress_health_check=SLOW)
    @given(strategy)
    def one(value) -> None:
        nonlocal count
        count += 1
        faulthandler.dump_traceback_later(
            2 * fuzzing.LONG, exit=True
        )  # a hang ends the run, with every stack
        trial(value)
        faulthandler.cancel_dump_traceback_later()

    one()
    return count


if __name__ == "__main__":
    sys.exit(main())
