"""What each job states about itself when it connects, and the checks whether two jobs fit together."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vcrd.errors import expected
from vcrd.settings import IDENTITIES, TRANSPORTS, LinkSettings

from . import connection as wire
from .connection import versions_differ
from .errors import HandshakeRefused
from .payload import STATE_DTYPES, Payload, payload_named
from .plan import Place, Shard, places, replica_of, students_of, vocab_shards

# Tokens in the largest micro-batch, b times s. A header that says more is refused before anything is allocated.
MOST_TOKENS = 1 << 22
_EQUAL = ("vocab_size", "sequence_length", "payload", "max_tokens")
# Limits of a handshake: its numbers decide about memory and loops.
_MOST_COLUMNS = (1 << 31) - 1  # tokens travel as int32
_MOST_RANKS = 1 << 16
_LARGEST_STATE = 1 << 16
LONGEST_NAME = 200  # characters of a tokenizer's type, or of a checkpoint's name
_DIGEST = re.compile(r"[0-9a-f]{0,64}")


@dataclass(frozen=True)
class Head:
    """The output layer of the teacher, for the payload "hidden": logits = scale * states @ weight.T, then
    softcap * tanh(logits / softcap) unless softcap is None.

    Attributes:
        size: of a hidden state, up to 65536.
        dtype: of states and weight, "float32", "bfloat16" or "float16".

    ValueError for other values.
    """

    size: int
    dtype: str
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= _LARGEST_STATE:
            raise expected("size", f"an integer from 1 to {_LARGEST_STATE}", repr(self.size))
        if not isinstance(self.dtype, str) or self.dtype not in STATE_DTYPES:
            raise expected("dtype", f"one of {', '.join(STATE_DTYPES)}", repr(self.dtype))
        for name in ("scale", "softcap"):
            number = getattr(self, name)
            if number is None and name == "softcap":
                continue
            if type(number) not in (int, float) or not abs(number) < 1e30:
                raise expected(name, "a finite number", repr(number))
        if self.softcap is not None and self.softcap <= 0:
            raise expected("softcap", "a number above 0 or None", repr(self.softcap))


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a job.

    Attributes:
        kind: its type, up to 200 characters.
        size: how many tokens it has.
        digest: of its vocabulary, 64 hexadecimal digits, equal for two tokenizers in which every id is the same token;
            "" for a tokenizer without a vocabulary, such as NullTokenizer of Megatron.

    ValueError for other values.
    """

    kind: str
    size: int
    digest: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not 0 < len(self.kind) <= LONGEST_NAME:
            raise expected("kind", f"a text of 1 to {LONGEST_NAME} characters", f"{self.kind!r:.300}")
        if type(self.size) is not int or not 0 <= self.size <= _MOST_COLUMNS:
            raise expected("size", f"an integer from 0 to {_MOST_COLUMNS}", f"{self.size!r:.300}")
        _check_digest("digest", self.digest)

    def __str__(self) -> str:
        vocabulary = f"vocabulary {self.digest[:12]}" if self.digest else "no vocabulary"
        return f"{self.kind} of {self.size} tokens ({vocabulary})"


@dataclass(frozen=True)
class Identity:
    """What a teacher states besides its layout.

    Attributes:
        tokenizer: the one that the model was trained with.
        weights: this rank's share of a digest of the weights, from 0 to 2^62 - 1; the shares of the ranks are added
            modulo 2^62.
        checkpoint: a name of these weights for people.

    Each is None or "" where it is not known.
    """

    tokenizer: Tokenizer | None = None
    weights: int | None = None
    checkpoint: str = ""


@dataclass(frozen=True)
class TeacherPlace:
    """A rank's place in the teacher job: replica (data-parallel rank) and tensor rank, each with how many there are.

    Attributes:
        is_last_stage: whether the rank belongs to the last pipeline stage.

    ValueError for ranks out of range.
    """

    replica: int = 0
    replicas: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    is_last_stage: bool = True

    def __post_init__(self) -> None:
        for name, rank, size in (
            ("tensor_rank", self.tensor_rank, self.tensor_size),
            ("replica", self.replica, self.replicas),
        ):
            if not 0 <= rank < size:
                raise expected(name, f"an integer in [0, {size})", rank)

    @property
    def sender(self) -> int | None:
        """The tensor rank whose columns this rank sends; None before the last stage."""
        return self.tensor_rank if self.is_last_stage else None


@dataclass(frozen=True)
class Handshake:
    """What one job states. vocab_size, sequence_length, payload and max_tokens must be equal in both jobs.

    top_k: with the payload "topk", else 0. copies: the data-parallel size of the student, or the number of teacher
    replicas. context_size: 1 from the teacher. credits: 0 from the teacher. head: from the teacher, with "hidden" only.
    transport: the setting. nccl: the version of NCCL that this job can use, 22809 for 2.28.9; 0 for none. tokenizer:
    None if not known. weights: from the teacher, the digest of its weights, hexadecimal; "" if not known. checkpoint:
    from the teacher, the name of these weights. identity: from the student, the setting. teacher_context_length: from
    the student, the setting. positions: from the teacher, the longest sequence that its model takes; 0 for no limit.
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
    transport: str = "auto"
    nccl: int = 0
    tokenizer: Tokenizer | None = None
    weights: str = ""
    checkpoint: str = ""
    identity: str = "check"
    teacher_context_length: int = 0
    positions: int = 0
    protocol: int = field(default_factory=lambda: wire.PROTOCOL)

    @classmethod
    def of(cls, settings: LinkSettings, **own: Any) -> Handshake:
        """The handshake of one job; ValueError for impossible values."""
        if settings.payload != "hidden" and own.get("head") is not None:
            raise expected("head", f"None with the payload {settings.payload!r}", own["head"])
        handshake = cls(
            payload=settings.payload,
            max_tokens=MOST_TOKENS,
            transport=settings.transport,
            top_k=settings.top_k if settings.payload == "topk" else 0,
            **own,
        )
        _check_layout(handshake)
        return handshake

    @classmethod
    def of_student(cls, settings: LinkSettings, *, data_size: int, **own: Any) -> Handshake:
        """The handshake of the student job; ValueError as of `of`.

        With credits 0 nothing is requested in advance, and one request is under way at a time.
        """
        return cls.of(
            settings,
            copies=data_size,
            credits=max(1, settings.credits),
            identity=settings.identity,
            teacher_context_length=settings.teacher_context_length,
            **own,
        )

    @property
    def ranks(self) -> int:
        """How many ranks the last pipeline stage of the student has; in the handshake of the student."""
        return self.copies * self.context_size * self.tensor_size

    def shards(self) -> tuple[Shard, ...]:
        return vocab_shards(self.vocab_size, self.padded_vocab_size, self.tensor_size)

    def content(self) -> Payload:
        """The payload with everything that its size depends on; in the handshake of the teacher."""
        payload = payload_named(self.payload).sized(top_k=self.top_k)
        if self.head is None:
            return payload
        return payload.sized(state_size=self.head.size, state_dtype=STATE_DTYPES[self.head.dtype])

    def places(self, replica: int, replicas: int) -> tuple[Place, ...]:
        """The student ranks that a teacher replica serves; in the handshake of the student."""
        return places(students_of(replica, self.copies, replicas), self.context_size, self.tensor_size)

    @property
    def named_weights(self) -> str:
        """The weights of the teacher, as the messages name them."""
        return f"{self.weights} ({self.checkpoint})" if self.checkpoint else self.weights

    def plain(self) -> dict:
        """The form for JSON."""
        return asdict(self)


def read(values: Any, whose: str) -> Handshake:
    """The handshake that JSON values are; HandshakeRefused if they are none, or of another protocol version."""
    if not isinstance(values, dict) or not isinstance(values.get("protocol"), int):
        raise HandshakeRefused(f"the link is refused: the {whose}'s handshake cannot be read")
    if values["protocol"] != wire.PROTOCOL:
        # The handshake of another version may have other fields; its version alone is enough to refuse it.
        if whose == "student":
            reason = f"a student rank's protocol version is {values['protocol']}, not {wire.PROTOCOL}"
            raise HandshakeRefused(f"the link is refused: {reason}")
        return Handshake(0, 0, "", 0, 0, 0, 0, protocol=values["protocol"])
    try:
        if values.keys() != {each.name for each in fields(Handshake)} or not isinstance(
            values["payload"], str
        ):
            raise ValueError
        if values["transport"] not in TRANSPORTS or values["identity"] not in IDENTITIES:
            raise ValueError
        head = None if values["head"] is None else Head(**values["head"])
        tokenizer = None if values["tokenizer"] is None else Tokenizer(**values["tokenizer"])
        handshake = Handshake(**{**values, "head": head, "tokenizer": tokenizer})
        _check_numbers(handshake)
        _check_identity(handshake)
    except (TypeError, ValueError):
        reason = f"the {whose}'s handshake is not that of protocol {wire.PROTOCOL}"
        raise HandshakeRefused(f"the link is refused: {reason}") from None
    return handshake


def refusal(
    student: Handshake, teacher: Handshake, replicas: int, first: Handshake | None = None
) -> str | None:
    """Why these two jobs may not be linked, in one sentence for both of them; None if they may.

    replicas: the number of replicas that the first replica has stated. first: the handshake of the first teacher of the
    run, to compare the weights with; None for none.
    """
    if student.protocol != teacher.protocol:
        return _sentence([versions_differ(student.protocol, teacher.protocol)])
    reasons = [
        f"{name} is {getattr(student, name)} for the student and {getattr(teacher, name)} for the teacher"
        for name in (*_EQUAL, "top_k")
        if getattr(student, name) != getattr(teacher, name)
    ]
    reasons += _transport_misfits(student, teacher)
    if teacher.copies != replicas:
        reasons.append(f"one teacher replica counts {replicas} replicas, another {teacher.copies}")
    if teacher.copies > student.copies:
        reasons.append(
            f"{teacher.copies} teacher replicas are more than the student's {student.copies} data ranks"
        )
    for whose, handshake in (("student", student), ("teacher", teacher)):
        try:
            _check_layout(handshake)
        except ValueError as error:
            reasons.append(f"the {whose}'s {error}")
    longest = student.sequence_length + student.teacher_context_length
    if student.teacher_context_length and 0 < teacher.positions < longest:
        reasons.append(
            f"teacher_context_length {student.teacher_context_length} of the student beside sequences of "
            f"{student.sequence_length} needs {longest} positions, and the teacher's model has {teacher.positions}"
        )
    if (teacher.payload == "hidden") != (teacher.head is not None):
        states = "no" if teacher.head is None else "an"
        reasons.append(f"the teacher states {states} output layer with the payload {teacher.payload!r}")
    if student.identity != "warn":
        reasons += [
            f"{each}; identity 'warn' would let it in" for each in _differences(student, teacher, first)
        ]
    if student.identity == "insist":
        reasons += _unstated(student, teacher)
    return _sentence(reasons) if reasons else None


def doubts(student: Handshake, teacher: Handshake, first: Handshake | None = None) -> list[str]:
    """Warnings about two jobs that may be linked. first: as for `refusal`."""
    said = _differences(student, teacher, first) if student.identity == "warn" else []
    mine, theirs = student.tokenizer, teacher.tokenizer
    known = mine and theirs and mine.digest and theirs.digest
    if mine and theirs and not known and (mine.kind, mine.size) != (theirs.kind, theirs.size):
        said.append(
            f"tokenizer is {mine} for the student and {theirs} for the teacher: these cannot be compared"
        )
    if first is not None and first.weights and not teacher.weights:
        said.append(f"this teacher's weights are not known, the first of this run has {first.named_weights}")
    return said


def _differences(student: Handshake, teacher: Handshake, first: Handshake | None) -> list[str]:
    """Where digests differ: an id is not the same token in both jobs, or a teacher has other weights than before."""
    found = []
    mine, theirs = student.tokenizer, teacher.tokenizer
    if mine and theirs and mine.digest and theirs.digest and mine.digest != theirs.digest:
        found.append(
            f"tokenizer is {mine} for the student and {theirs} for the teacher, which give other tokens to the same ids"
        )
    if first is not None and first.weights and teacher.weights and teacher.weights != first.weights:
        found.append(
            f"this teacher has the weights {teacher.named_weights}, the first of this run {first.named_weights}"
        )
    return found


def _unstated(student: Handshake, teacher: Handshake) -> list[str]:
    """What identity "insist" requires and a job does not state."""
    reasons = [
        f"identity is 'insist', and the {whose} states no tokenizer with a vocabulary"
        for whose, handshake in (("student", student), ("teacher", teacher))
        if handshake.tokenizer is None or not handshake.tokenizer.digest
    ]
    if not teacher.weights:
        reasons.append("identity is 'insist', and the teacher states no digest of its weights")
    return reasons


def transport_of(student: Handshake, teacher: Handshake, missing: str = "") -> tuple[str, str]:
    """The transport that two jobs try; and the reason, where it is TCP and no setting requires TCP.

    missing: what the teacher lacks for NCCL, in words. No reason where neither job could use NCCL.
    """
    said = {student.transport, teacher.transport}
    if said & {"tcp", "fake"}:
        return said.pop() if len(said) == 1 else "tcp", ""
    if student.nccl and student.nccl == teacher.nccl:
        return "nccl", ""
    versions = f"NCCL is {_versions(student, teacher)}" if student.nccl or teacher.nccl else ""
    return "tcp", missing or versions


def _transport_misfits(student: Handshake, teacher: Handshake) -> list[str]:
    said = {student.transport, teacher.transport} - {"auto"}
    if len(said) > 1 or (said == {"fake"} and student.transport != teacher.transport):
        return [f"transport is {student.transport} for the student and {teacher.transport} for the teacher"]
    if said == {"nccl"} and not (student.nccl and student.nccl == teacher.nccl):
        return [f"transport is nccl, and NCCL is {_versions(student, teacher)}"]
    return []


def _versions(student: Handshake, teacher: Handshake) -> str:
    def version(handshake: Handshake) -> str:
        if not handshake.nccl:
            return "not available"
        return f"{handshake.nccl // 10000}.{handshake.nccl // 100 % 100}.{handshake.nccl % 100}"

    return f"{version(student)} for the student and {version(teacher)} for the teacher"


def served_by(student: Handshake, replicas: int, data_rank: int) -> int:
    """The replica that serves a data-parallel rank; 0 if there are too many replicas, which is refused later."""
    return replica_of(data_rank, student.copies, replicas) if replicas <= student.copies else 0


def _check_numbers(handshake: Handshake) -> None:
    """ValueError for a number that is no count or is too large to loop over."""
    for each in fields(handshake):
        value = getattr(handshake, each.name)
        if each.type == "int" and (type(value) is not int or not 0 <= value < 1 << 48):
            raise expected(each.name, "an integer of at least 0", repr(value))
    if handshake.padded_vocab_size > _MOST_COLUMNS:
        raise expected("padded_vocab_size", f"at most {_MOST_COLUMNS}", handshake.padded_vocab_size)
    sizes = (handshake.copies, handshake.context_size, handshake.tensor_size)
    if math.prod(max(size, 1) for size in sizes) > _MOST_RANKS:
        raise expected("ranks", f"at most {_MOST_RANKS} in a job", " x ".join(map(str, sizes)))


def _check_identity(handshake: Handshake) -> None:
    """ValueError for an invalid digest or name."""
    _check_digest("weights", handshake.weights)
    if not isinstance(handshake.checkpoint, str) or len(handshake.checkpoint) > LONGEST_NAME:
        raise expected(
            "checkpoint", f"a text of at most {LONGEST_NAME} characters", f"{handshake.checkpoint!r:.300}"
        )


def _check_digest(name: str, digest: Any) -> None:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise expected(name, "at most 64 hexadecimal digits", f"{digest!r:.300}")


def _check_layout(handshake: Handshake) -> None:
    _check_numbers(handshake)
    _check_identity(handshake)
    for name in ("sequence_length", "tensor_size", "copies", "context_size"):
        if getattr(handshake, name) < 1:
            raise expected(name, "at least 1", getattr(handshake, name))
    handshake.shards()
    payload_named(handshake.payload)
    if handshake.top_k > handshake.vocab_size:
        raise expected("top_k", f"at most vocab_size {handshake.vocab_size}", handshake.top_k)


def _sentence(reasons: list[str]) -> str:
    return "the link is refused: " + "; ".join(reasons)
