"""What each side states about itself when it joins, and the sentence that refuses a misfit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

from . import header as headers
from .errors import HandshakeRefused
from .plan import Roster, Shard, replica_of, students_of, vocab_shards

_LARGEST_TEXT = 4096


@dataclass(frozen=True)
class Facts:
    """One side's statement. protocol .. max_tokens must be equal on both sides.

    copies: the student's data-parallel size, or the teacher's replicas. credits: 0 from the teacher.
    intake_sender: the tensor rank of the teacher's rank 0 if that is on its last stage, else -1.
    """

    vocab_size: int
    sequence_length: int
    payload: str
    max_tokens: int
    padded_vocab_size: int
    tensor_size: int
    copies: int
    credits: int = 0
    intake_sender: int = -1
    protocol: int = field(default_factory=lambda: headers.PROTOCOL)

    def shards(self) -> tuple[Shard, ...]:
        return vocab_shards(self.vocab_size, self.padded_vocab_size, self.tensor_size)

    def text(self) -> str:
        return json.dumps(asdict(self))


def read(text: bytes, whose: str) -> Facts:
    """Facts from their text; HandshakeRefused if it is not that, or of another protocol version."""
    values = None
    if len(text) <= _LARGEST_TEXT:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            pass
    if not isinstance(values, dict) or not isinstance(values.get("protocol"), int):
        raise HandshakeRefused(f"the link is refused: the {whose}'s facts cannot be read")
    names = {each.name for each in fields(Facts)}
    if values["protocol"] == headers.PROTOCOL and not (values.keys() == names and _well_typed(values)):
        raise HandshakeRefused(
            f"the link is refused: the {whose}'s facts are not those of protocol {headers.PROTOCOL}"
        )
    # Another version may state other facts; those in common are enough to say that the versions differ.
    blank = {name: "" if name == "payload" else 0 for name in names}
    return Facts(**(blank | {name: value for name, value in values.items() if name in names}))


def refusal(student: Facts, teacher: Facts, replicas: int) -> str | None:
    """Why these two may not be linked, in one sentence that reads the same on both sides; None if they may.

    replicas: the number that the first replica to come announced.
    """
    if student.protocol != teacher.protocol:
        return _sentence([_differ("protocol version", student.protocol, teacher.protocol)])
    reasons = [
        _differ(name, getattr(student, name), getattr(teacher, name))
        for name in ("vocab_size", "sequence_length", "payload", "max_tokens")
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
    return _sentence(reasons) if reasons else None


def roster(student: Facts, teacher: Facts, replica: int) -> Roster:
    """The seats of a replica's group, once nothing is refused."""
    return Roster(
        data_ranks=students_of(replica, student.copies, teacher.copies),
        student_tensor_size=student.tensor_size,
        teacher_tensor_size=teacher.tensor_size,
        intake_sender=teacher.intake_sender,
    )


def served_by(student: Facts, replicas: int, data_rank: int) -> int:
    """The replica that a data rank turns to; 0, to be refused, if replicas outnumber data ranks."""
    return replica_of(data_rank, student.copies, replicas) if replicas <= student.copies else 0


def _well_typed(values: dict) -> bool:
    numbers = [value for name, value in values.items() if name != "payload"]
    return isinstance(values["payload"], str) and all(type(n) is int and -1 <= n < 1 << 48 for n in numbers)


def _check_layout(facts: Facts) -> None:
    facts.shards()
    if facts.copies < 1:
        raise ValueError(f"copies must be at least 1, got {facts.copies}")
    if facts.intake_sender >= facts.tensor_size:
        raise ValueError(
            f"intake_sender must be below tensor_size {facts.tensor_size}, got {facts.intake_sender}"
        )


def _differ(name: str, student: object, teacher: object) -> str:
    return f"{name} is {student} for the student and {teacher} for the teacher"


def _sentence(reasons: list[str]) -> str:
    return "the link is refused: " + "; ".join(reasons)
