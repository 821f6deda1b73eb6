"""Why a student waited for its teacher, and what to try, in one sentence. Pure functions of what the link counted."""

from __future__ import annotations

from dataclasses import dataclass

from vcrd.link.payload import payload_named

WORTH_SAYING = 0.05  # share of the step
IDLE = 0.5  # share of a teacher's time
_MOST = 0.5  # share of the wait from which on something counts as its cause
_BURSTS = 0.5  # share of late answers, below which the teacher keeps up on average
# Assumed for the teacher, whose size the student does not know: few of today's open models are larger.
_HIDDEN_SIZE = 8192


@dataclass(frozen=True)
class Wait:
    """How a student rank waited for one teacher replica over a number of steps.

    teacher: the name of the teacher, "" if it has none.

    share: share of the time that was spent in waiting. arriving: share of the wait in which bytes of an answer were
    arriving. while_lost: share of the wait without a teacher. late: share of the answers that had not arrived when they
    were needed. bytes_per_second: received, over all of the time.
    """

    replica: int
    share: float
    arriving: float
    while_lost: float
    late: float
    bytes_per_second: float
    teacher: str = ""

    @property
    def who(self) -> str:
        """The replica in words."""
        if self.teacher:
            return f"replica {self.replica} of teacher {self.teacher}"
        return f"teacher replica {self.replica}"


@dataclass(frozen=True)
class Setup:
    """What the advice depends on. columns: vocabulary columns that a student rank receives."""

    payload: str
    columns: int
    top_k: int
    temperature: float
    credits: int
    replicas: int
    data_ranks: int


def cause(wait: Wait) -> str:
    """ "lost" if there was no teacher for most of the wait, "link" if answers were arriving for most of it, "bursts" if
    most answers came in time, else "teacher"."""
    if wait.while_lost > _MOST:
        return "lost"
    if wait.arriving > _MOST:
        return "link"
    return "bursts" if wait.late < _BURSTS else "teacher"


def sentence(wait: Wait, setup: Setup) -> str | None:
    """What happened and what to try; None if the wait was short."""
    if wait.share < WORTH_SAYING:
        return None
    found = f"student waited {_percent(wait.share)} of the step for {wait.who}"
    why = cause(wait)
    if why == "lost":
        return f"{found}, which was lost and came back; its own log says why"
    if why == "link":
        rate = f"{wait.bytes_per_second / 1e9:.2g} GB/s into the rank that waited longest"
        return f"{found}, whose answers were arriving: the link is full ({rate}); {_lighter(wait, setup)}"
    if setup.credits == 0:
        advice = "try credits 2, because nothing is asked ahead with credits 0"
    elif why == "bursts":
        advice = f"most answers came in time: try credits {2 * setup.credits}, to even out bursts"
    elif setup.replicas < setup.data_ranks:
        advice = f"try more teacher replicas than {setup.replicas}"
    else:
        advice = "try replicas of more GPUs, because each data rank has its own replica already"
    return f"{found}, which had not begun to answer; {advice}"


def idle_sentence(replica: int, idle: float) -> str | None:
    """What to say of a teacher replica that waited for requests for this share of its time; None if it was busy."""
    if idle < IDLE:
        return None
    share = _percent(idle)
    return f"teacher replica {replica} was idle {share} of the time: it could serve more students, or use fewer GPUs"


def bytes_per_token(payload: str, setup: Setup) -> int:
    """Bytes per token of a payload, into one student rank."""
    sized = payload_named(payload).sized(top_k=setup.top_k, state_size=_HIDDEN_SIZE)
    return sized.bytes(1, setup.columns)


def _lighter(wait: Wait, setup: Setup) -> str:
    """Advice: the first payload that is small enough to end the wait, in the order of their errors."""
    now = bytes_per_token(setup.payload, setup)
    # A full link is busy for the whole step. It may be busy for the time in which the student computes.
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
