"""What each side states about itself when it joins, and the sentence that refuses a misfit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import header as headers
from .errors import HandshakeRefused
from .payload import STATE_DTYPES, Payload, payload_named
from .plan import Place, Shard, places, replica_of, students_of, vocab_shards
from .settings import LinkSettings
from .wire import versions_differ

_EQUAL = ("vocab_size", "sequence_length", "payload", "max_tokens")


@dataclass(frozen=True)
class Head:
    """The teacher's output layer, as the payload "hidden" needs it: logits = scale * states @ weight.T, then
    softcap * tanh(logits / softcap) unless softcap is 0. size: of a state. dtype: of states and weight."""

    size: int
    dtype: str
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Facts:
    """One side's statement. vocab_size .. max_tokens must be equal on both sides.

    top_k: with the payload "topk", else 0. copies: the student's data-parallel size, or the teacher's replicas.
    context_size: 1 from the teacher. credits: 0 from the teacher. head: from the teacher, with "hidden".
    """

    vocab_size: int
    sequence_length: int
    payload: str
    max_tokens: int
    padded_vocab_size: int
    tensor_size: int
    copies: int
    context_size: int = 1
    top_k: int = 0
    credits: int = 0
    head: Head | None = None
    protocol: int = field(default_factory=lambda: headers.PROTOCOL)

    @classmethod
    def of(cls, settings: LinkSettings, **own: Any) -> Facts:
        """The facts of one side; ValueError for a layout that cannot be."""
        facts = cls(
            payload=settings.payload,
            max_tokens=settings.max_tokens,
            top_k=settings.top_k if settings.payload == "topk" else 0,
            **own,
        )
        _check_layout(facts)
        return facts

    def shards(self) -> tuple[Shard, ...]:
        return vocab_shards(self.vocab_size, self.padded_vocab_size, self.tensor_size)

    def content(self) -> Payload:
        """The payload with everything that its size depends on; from the teacher's facts."""
        payload = payload_named(self.payload)
        if self.head is None:
            return payload.sized(top_k=self.top_k)
        return payload.sized(state_size=self.head.size, state_dtype=STATE_DTYPES[self.head.dtype])

    def places(self, replica: int, replicas: int) -> tuple[Place, ...]:
        """The student's ranks that a teacher replica serves; from the student's facts."""
        return places(students_of(replica, self.copies, replicas), self.context_size, self.tensor_size)

    def plain(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def read(values: Any, whose: str) -> Facts:
    """Facts from what JSON held; HandshakeRefused if it is not that, or of another protocol version."""
    if not isinstance(values, dict) or not isinstance(values.get("protocol"), int):
        raise HandshakeRefused(f"the link is refused: the {whose}'s facts cannot be read")
    if values["protocol"] != headers.PROTOCOL:
        # Another version may state other facts; this one alone is enough to refuse it.
        return Facts(0, 0, "", 0, 0, 0, 0, protocol=values["protocol"])
    names = {each.name for each in fields(Facts)}
    if values.keys() != names or not _well_typed(values):
        raise HandshakeRefused(
            f"the link is refused: the {whose}'s facts are not those of protocol {headers.PROTOCOL}"
        )
    head = values["head"]
    return Facts(**{**values, "head": None if head is None else Head(**head)})


def refusal(student: Facts, teacher: Facts, replicas: int) -> str | None:
    """Why these two may not be linked, in one sentence that reads the same on both sides; None if they may.

    replicas: the number that the first replica to come announced.
    """
    if student.protocol != teacher.protocol:
        return _sentence([versions_differ(student.protocol, teacher.protocol)])
    reasons = [
        f"{name} is {getattr(student, name)} for the student and {getattr(teacher, name)} for the teacher"
        for name in (*_EQUAL, "top_k")
        if getattr(student, name) != getattr(teacher, name)
    ]
    if teacher.copies != replicas:
        reasons.append(f"one teacher replica counts {replicas} replicas, another {teacher.copies}")
    if teacher.copies > student.copies:
        reasons.append(
            f"{teacher.copies} teacher replicas are more than the student's {student.copies} data ranks"
        )
    for whose, facts in (("student", student), ("teacher", teacher)):
        try:
            _check_layout(facts)
        except ValueError as error:
            reasons.append(f"for the {whose} {error}")
    if teacher.payload == "hidden" and teacher.head is None:
        reasons.append("the teacher states no output layer, which the payload 'hidden' needs")
    return _sentence(reasons) if reasons else None


def served_by(student: Facts, replicas: int, data_rank: int) -> int:
    """The replica that a data rank turns to; 0, to be refused, if replicas outnumber data ranks."""
    return replica_of(data_rank, student.copies, replicas) if replicas <= student.copies else 0


def _well_typed(values: dict) -> bool:
    numbers = [value for name, value in values.items() if name not in ("payload", "head")]
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        return False
    head = values["head"]
    if head is not None:
        if not isinstance(head, dict) or head.keys() != {each.name for each in fields(Head)}:
            return False
        size, scale, softcap = head["size"], head["scale"], head["softcap"]
        if type(size) is not int or not 1 <= size < 1 << 24 or head["dtype"] not in STATE_DTYPES:
            return False
        if not all(type(number) in (int, float) and abs(number) < 1e30 for number in (scale, softcap)):
            return False
    return isinstance(values["payload"], str)


def _check_layout(facts: Facts) -> None:
    facts.shards()
    payload_named(facts.payload)
    if facts.copies < 1:
        raise ValueError(f"copies must be at least 1, got {facts.copies}")
    if facts.context_size < 1:
        raise ValueError(f"context_size must be at least 1, got {facts.context_size}")
    if facts.top_k > facts.vocab_size:
        raise ValueError(f"top_k must be at most vocab_size {facts.vocab_size}, got {facts.top_k}")


def _sentence(reasons: list[str]) -> str:
    return "the link is refused: " + "; ".join(reasons)
