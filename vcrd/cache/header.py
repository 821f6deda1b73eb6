"""What a cache says about the teacher that has answered, and the key under which an answer is found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vcrd.errors import check_integer, expected, wrong_type
from vcrd.link.handshake import Handshake, Head, Tokenizer
from vcrd.link.payload import STATE_DTYPES, Payload, payload_named
from vcrd.link.question import NO_CONTEXT, Context

VERSION = 1  # of the files, of their header, and of the encoding of every payload
KEY_BYTES = 32


class CacheError(ValueError):
    """A cache that cannot be used, read or written, in one sentence."""


def key_of(tokens: Tensor, context: Context = NO_CONTEXT) -> bytes:
    """The key of the answer about one sequence: 32 bytes, a SHA-256.

    tokens: integers [n], a row of a micro-batch or one packed sequence. context: what the teacher alone sees, with
    `places` counted from the first token of this sequence. The key depends on nothing else, so not on the place of the
    sequence in its micro-batch or in the data. ValueError for tokens that are not one sequence or do not fit into 32
    bits.
    """
    if tokens.dim() != 1 or tokens.is_floating_point() or not len(tokens):
        raise expected(
            "tokens", "integers of shape [n], n at least 1", f"{tokens.dtype} {list(tokens.shape)}"
        )
    digest = hashlib.sha256(b"vcrd answer 1")
    for numbers in (tokens, *context):
        numbers = numbers.detach().to("cpu", torch.int64)
        if len(numbers) and not -(1 << 31) <= int(numbers.min()) <= int(numbers.max()) < 1 << 31:
            raise expected("tokens", "integers of 32 bits", f"{int(numbers.min())} to {int(numbers.max())}")
        digest.update(len(numbers).to_bytes(8, "little"))
        digest.update(numbers.to(torch.int32).numpy().astype("<i4", copy=False).tobytes())
    return digest.digest()


@dataclass(frozen=True)
class CacheHeader:
    """What all answers of a cache have in common. ValueError for impossible values.

    payload, vocab_size, top_k: as in the handshake of the link; top_k is 0 but for "topk". head: the output layer of
    the teacher, for "hidden" only. weights: the digest of the teacher's weights, hexadecimal; checkpoint: a name of
    these weights for people. tokenizer: the one that the teacher was trained with. Of a header that a reader expects,
    `head` None, `weights` "" and `tokenizer` None mean "any".
    """

    payload: str
    vocab_size: int
    top_k: int = 0
    head: Head | None = None
    weights: str = ""
    checkpoint: str = ""
    tokenizer: Tokenizer | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        payload = payload_named(self.payload)
        check_integer("vocab_size", self.vocab_size, 1, (1 << 31) - 1)
        if payload.name == "topk":
            check_integer("top_k", self.top_k, 1, self.vocab_size)
        elif self.top_k:
            raise expected("top_k", f"0 with the payload {self.payload!r}", self.top_k)
        for name in ("weights", "checkpoint"):
            if not isinstance(getattr(self, name), str):
                raise wrong_type(name, "a text", getattr(self, name))
        if self.head is not None and payload.name != "hidden":
            raise expected("head", f"None with the payload {self.payload!r}", self.head)

    @classmethod
    def of(cls, teacher: Handshake) -> CacheHeader:
        """The header for the answers of a teacher that states this handshake."""
        same = ("payload", "vocab_size", "top_k", "head", "weights", "checkpoint", "tokenizer")
        return cls(**{name: getattr(teacher, name) for name in same})

    def content(self) -> Payload:
        """The payload with everything that its size depends on. ValueError for "hidden" without a head."""
        payload = payload_named(self.payload).sized(top_k=self.top_k)
        if payload.name != "hidden":
            return payload
        if self.head is None:
            raise expected("head", "the output layer of the teacher with the payload 'hidden'", "None")
        return payload.sized(state_size=self.head.size, state_dtype=STATE_DTYPES[self.head.dtype])

    def differences(self, wanted: CacheHeader, exact: bool = False) -> list[str]:
        """Where this header of a cache is not the wanted one: one clause per field, empty if they fit together.

        exact: of answers that are to be added to the cache. Then the weights must be known on both sides or on none.
        Tokenizers are compared where both have a digest of their vocabulary. The name of the checkpoint is not
        compared.
        """
        found = []
        for name in ("version", "payload", "vocab_size", "top_k", "head", "weights"):
            mine, other = getattr(self, name), getattr(wanted, name)
            is_any = not exact and ((name == "head" and other is None) or (name == "weights" and not other))
            if mine != other and not is_any:
                found.append(f"{name}: expected {_shown(wanted, name)}, got {_shown(self, name)}")
        mine, other = self.tokenizer, wanted.tokenizer
        if mine and other and mine.digest and other.digest and mine.digest != other.digest:
            found.append(f"tokenizer: expected {other}, got {mine}")
        return found

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, text: str) -> CacheHeader:
        """The header that `text` has written. ValueError if it is none, or that of another version."""
        values: Any = json.loads(text)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, dict) else None
            raise expected("version", str(VERSION), repr(version))
        if values.keys() != {each.name for each in fields(cls)}:
            raise expected("fields", ", ".join(each.name for each in fields(cls)), ", ".join(values))
        for name, kind in (("head", Head), ("tokenizer", Tokenizer)):
            if values[name] is not None:
                values[name] = kind(**values[name])
        return cls(**values)


def _shown(header: CacheHeader, name: str) -> str:
    value = getattr(header, name)
    if name == "weights":
        if not value:
            return "weights that are not known"
        return f"{value} ({header.checkpoint})" if header.checkpoint else value
    return str(value)
