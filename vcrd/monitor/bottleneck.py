"""Why a student waited for its teacher, in words, and what to try. Pure functions of what the link counted."""

from __future__ import annotations

from dataclasses import dataclass

from vcrd.link.payload import payload_named

WORTH_SAYING = 0.05  # of the step
IDLE = 0.5  # of a teacher's time
_MOST = 0.5  # of the wait: what counts as its cause
_BURSTS = 0.5  # of the answers: where fewer were late, the others came early
# Of the teacher, where the student does not know it: as large as any of today's open models but a few.
_HIDDEN_SIZE, _HIDDEN_BYTES = 8192, 2


@dataclass(frozen=True)
class Wait:
    """What a student rank waited for one teacher replica, in a stretch of training.

    share: of the time. arriving: share of the wait in which the teacher's bytes were on their way in. while_lost: share
    of it in which no teacher was there. late: share of the answers that were not there when they were needed.
    bytes_per_second: that came in, over the whole stretch.
    """

    replica: int
    share: float
    arriving: float
    while_lost: float
    late: float
    bytes_per_second: float


@dataclass(frozen=True)
class Setup:
    """What the advice depends on. columns: of the vocabulary, that a student rank receives. ahead: None for credits."""

    payload: str
    columns: int
    top_k: int
    temperature: float
    credits: int
    ahead: int | None
    replicas: int
    data_ranks: int


def cause(wait: Wait) -> str:
    """ "lost" where no teacher was there, "link" where answers took long to arrive, "bursts" where most of them came
    in time, else "teacher"."""
    if wait.while_lost > _MOST:
        return "lost"
    if wait.arriving > _MOST:
        return "link"
    return "bursts" if wait.late < _BURSTS else "teacher"


def sentence(wait: Wait, setup: Setup) -> str | None:
    """What happened and what to try; None where it is not worth saying."""
    if wait.share < WORTH_SAYING:
        return None
    found = f"student waited {_percent(wait.share)} of the step for teacher replica {wait.replica}"
    why = cause(wait)
    if why == "lost":
        return f"{found}, which was lost and came back; its own log says why"
    if why == "link":
        rate = f"{wait.bytes_per_second / 1e9:.2g} GB/s into the rank that waited longest"
        return f"{found}, whose answers were on their way: the link is full ({rate}); {_lighter(wait, setup)}"
    if setup.ahead is not None and setup.ahead < setup.credits:
        advice = f"try ahead {setup.credits}, for it is asked only {setup.ahead} micro-batches ahead"
    elif why == "bursts":
        advice = f"most answers came in time: try credits {2 * setup.credits}, which evens out bursts"
    elif setup.replicas < setup.data_ranks:
        advice = f"try more teacher replicas than {setup.replicas}"
    else:
        advice = "try replicas of more GPUs, for each data rank has one of its own"
    return f"{found}, which had not begun to answer; {advice}"


def idle_sentence(replica: int, idle: float) -> str | None:
    """Of a teacher replica that waited for requests for this share of its time; None where that is as it should be."""
    if idle < IDLE:
        return None
    share = _percent(idle)
    return (
        f"teacher replica {replica} was idle {share} of the time: it could serve more students, or be smaller"
    )


def bytes_per_token(payload: str, setup: Setup) -> int:
    """Of a payload, into one student rank."""
    sized = payload_named(payload).sized(top_k=setup.top_k, state_size=_HIDDEN_SIZE)
    return sized.bytes(1, setup.columns)


def _lighter(wait: Wait, setup: Setup) -> str:
    """The first payload, in the order of its cost to what is learnt, that is small enough for the wait to end."""
    now = bytes_per_token(setup.payload, setup)
    # A full link is busy all the time; it may be for as long as the student computes.
    enough = (1 - wait.share) * now
    order = ["float16", "logits_8bit", "hidden"] + ["topk"] * (setup.temperature == 1)
    lighter = [name for name in order if name != setup.payload and bytes_per_token(name, setup) < now]
    for name in lighter:
        if bytes_per_token(name, setup) <= enough:
            return f"try payload {name}"
    if lighter:
        least = min(lighter, key=lambda name: bytes_per_token(name, setup))
        return f"try payload {least}, which may not be enough, or a faster interface"
    return "no payload is smaller: try a faster interface, or more tensor ranks"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
