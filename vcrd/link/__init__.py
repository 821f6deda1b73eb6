"""The link between a teacher job and a student job: two torch worlds, logits shard by shard between them.

Knows nothing of losses or of Megatron: integer tokens in, logits out.

The way of one micro-batch, and the thread of each step:

1. Student, the first rank of each data-parallel replica, training thread: `StudentLink.request` sends the tokens to the
   first rank of the teacher replica.
2. Teacher, first rank, thread `vcrd-link-requests` (`requests.RequestReceiver`): checks the request and queues it.
   `TeacherLink.next_batch`, in the thread that computes, takes it from the queue and shares it with every rank of the
   replica (`replica_group`). The model runs.
3. Teacher, each tensor rank of the last stage, the thread that computes: `TeacherLink.respond` finds the maximum of
   each row, cuts the piece of each student rank (`plan`), encodes it (`payload`) and hands it to that pair's transport.
4. The same rank, one thread `vcrd-link-writer` for each student rank (`respond.ResponseSender`): sends the header over
   TCP and the tensors over the transport (`transport`). The thread that computes does not wait, unless four responses
   are under way.
5. Student, each rank of the last stage, one thread `vcrd-link-reader` for each teacher rank (`student_connections`):
   checks the header, receives the tensors into their columns (`reassembly.Reassembly.place`) and begins the copy to the
   GPU.
6. The same rank, training thread: `StudentLink.receive` waits until every piece is there, and makes the current stream
   wait for the copies.

Threads `vcrd-link-listener` (`wire.Listener`) accept connections. A teacher's death shows in step 5 where a connection
ends, and in step 6 where nothing comes within `timeout`.
"""

from vcrd.settings import LinkSettings

from .answers import Hidden, TopK
from .errors import HandshakeRefused, LinkError, StudentLost, TeacherLost
from .handshake import Head, Tokenizer
from .plan import Piece, Place, Shard, Span, context_rows, overlaps, replica_of, students_of, vocab_shards
from .rendezvous import Rendezvous, host_rendezvous
from .requests import Request
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
