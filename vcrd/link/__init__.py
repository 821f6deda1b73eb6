"""The link between a teacher job and a student job: two torch worlds, logits shard by shard between them.

Knows nothing of losses or of Megatron: integer tokens in, logits out.
"""

from .answers import Hidden, TopK
from .errors import HandshakeRefused, LinkError, StudentLost, TeacherLost
from .handshake import Head, Tokenizer
from .plan import Piece, Place, Shard, Span, context_rows, overlaps, replica_of, students_of, vocab_shards
from .rendezvous import Rendezvous, host_rendezvous
from .requests import Request
from .settings import LinkSettings
from .student import StudentLink
from .teacher import TeacherLink
from .tracing import merge_traces, trace

__all__ = [
    "HandshakeRefused",
    "Head",
    "Hidden",
    "LinkError",
    "LinkSettings",
    "Piece",
    "Place",
    "Rendezvous",
    "Request",
    "Shard",
    "Span",
    "StudentLink",
    "StudentLost",
    "TeacherLink",
    "TeacherLost",
    "Tokenizer",
    "TopK",
    "context_rows",
    "host_rendezvous",
    "merge_traces",
    "overlaps",
    "replica_of",
    "students_of",
    "trace",
    "vocab_shards",
]
