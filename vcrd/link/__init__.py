"""The link between a teacher job and a student job: two torch worlds, logits shard by shard between them.

Knows nothing of losses or of Megatron: integer tokens in, logits out.
"""

from .errors import HandshakeRefused, LinkError, StudentLost, TeacherLost
from .intake import Request
from .plan import Piece, Shard, overlaps, replica_of, students_of, vocab_shards
from .rendezvous import host_store
from .settings import LinkSettings
from .student import StudentLink
from .teacher import TeacherLink

__all__ = [
    "HandshakeRefused",
    "LinkError",
    "LinkSettings",
    "Piece",
    "Request",
    "Shard",
    "StudentLink",
    "StudentLost",
    "TeacherLink",
    "TeacherLost",
    "host_store",
    "overlaps",
    "replica_of",
    "students_of",
    "vocab_shards",
]
