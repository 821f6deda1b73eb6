"""A teacher whose figures can only mean an error is named, in the first step and with each report; no other is."""

from __future__ import annotations

import pytest
from test_distillation import settings
from worlds import World, run_worlds
from wrong_teachers import linked_student, local_students, serve

GUESS = "predicts the labels no better than a guess"
UNIFORM = "gives every token the same probability"
PADDING = "has its most probable token in columns"
NOTHING = "is no distribution for any of "
# The student, the teacher's change, the labels, vocab_size; what is said in the first step.
WRONG = [
    ("the teacher", "permuted", "random", 48, GUESS),
    ("the teacher", "permuted", "the teacher's", 48, GUESS),
    ("the teacher", "zeroed", "random", 45, UNIFORM),
    ("another", "zeroed", "the teacher's", None, UNIFORM),
    ("the teacher", "padding", "random", None, PADDING),
    ("another", "padding", "the teacher's", None, PADDING),
    ("the teacher", "NaN", "random", 45, NOTHING),
    # Nothing tells it from one whose weights were not loaded, and the sentence says so.
    ("another", "as it is", "random", 45, GUESS),
]
HEALTHY = [
    ("the teacher", "as it is", "random", 45),
    ("the teacher", "as it is", "random", None),
    ("another", "as it is", "the teacher's", 45),  # a student that knows nothing yet
    ("another", "as it is", "the teacher's", None),
    ("another", "padding", "the teacher's", 45),  # padding that is named counts for nothing
    ("the teacher", "some NaN", "random", 45),  # counted, and told with the interval's figures
    ("untrained", "as it is", "random", 45),  # nearly uniform, and no error
]


def test_what_can_only_be_an_error_is_said_and_nothing_else():
    chosen = settings()
    cases = [case[:4] for case in WRONG] + HEALTHY
    ((found,),) = run_worlds(World(local_students, arguments=(chosen, cases)))
    for (*case, expected), (first, second, report) in zip(WRONG, found, strict=False):
        assert len(first) == len(report) == 1 and not second, (case, first, second, report)
        assert first[0].startswith(f"in the first step: the teacher {expected}"), case
        assert report[0].startswith(f"since the last report: the teacher {expected}"), case
    for case, said in zip(HEALTHY, found[len(WRONG) :], strict=True):
        assert said == [[], [], []], case


@pytest.mark.parametrize(
    ("payload", "change", "said"),
    [
        ("float16", "NaN", NOTHING),
        ("logits_8bit", "zeroed", UNIFORM),
        ("topk", "zeroed", UNIFORM),
        ("topk", "permuted", GUESS),
    ],
)
def test_over_the_link_the_replica_is_named(payload, change, said):
    """Data ranks 0 and 1 have a replica each; the second one's teacher is wrong. Its weights are the same."""
    chosen = settings(payload=payload, top_k=5, vocab_size=48 if change == "permuted" else 45)
    students, _ = run_worlds(
        World(linked_student, 2, arguments=(chosen,)),
        World(serve, 2, arguments=(chosen, change, 1)),
    )
    assert students[0] == [[], [], []]
    first, second, report = students[1]
    assert len(first) == len(report) == 1 and not second
    assert first[0].startswith(f"in the first step: teacher replica 1, on data rank 1, {said}")
    assert report[0].startswith(f"since the last report: teacher replica 1, on data rank 1, {said}")


def test_all_ranks_that_find_the_same_say_it_once():
    chosen = settings(payload="float32", vocab_size=45)
    students, _ = run_worlds(
        World(linked_student, 4, tensor=2, arguments=(chosen,)),
        World(serve, 1, arguments=(chosen, "zeroed")),
    )
    assert students[:3] == [[[], [], []]] * 3
    assert students[3][0][0].startswith(f"in the first step: the teacher {UNIFORM}")
