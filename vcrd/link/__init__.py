"""The link between a teacher job and a student job: two torch worlds, logits shard by shard between them.

The link knows nothing of losses or of Megatron. Integer tokens go in, logits come out.

The way of one tensor from `TeacherLink.respond` to `StudentLink.receive`, with the thread of each step:

1. Student, request leader (the first rank of each data-parallel replica), thread of the caller. `StudentLink.request`
   sends the tokens to the first rank of the teacher replica, as soon as the credits allow it
   (`StudentConnections.send_requests`).
2. Teacher, first rank, thread `vcrd-link-requests`. `RequestReceiver` checks the request and queues it.
   `TeacherLink.next_batch`, in the thread that computes, takes it from the queue and broadcasts it to all ranks of the
   replica (`ReplicaGroup`). The model runs.
3. Teacher, each tensor rank of the last stage, the thread that computes. `TeacherLink.respond` computes what concerns
   whole rows: their maximum (`payload.row_max`) or their top k. It waits while four responses are under way. For each
   student rank it cuts out the positions and the columns of that rank (`plan`) and encodes them (`payload.encode`).
   `ResponseSender.post` starts the copy to where the transport sends from (`Transport.stage`), and puts the piece into
   the queue of that student rank.
4. Teacher, the same rank, one thread `vcrd-link-writer` per student rank. It sends the header over TCP and then the
   tensors over the transport (`Transport.send`: `transport.tcp` or `transport.nccl`).
5. Student, each rank of the last stage, one thread `vcrd-link-reader` per teacher rank. It reads the header.
   `Reassembly.receive_piece` checks the header, takes memory for the whole response, and receives the tensors into
   their columns (`Transport.receive`). The thread that receives the last piece starts the copy to the GPU
   (`Transport.arrived`). Then the request leader sends the next request; the other ranks report their progress to it.
6. Student, the same rank, training thread. `StudentLink.receive` waits until every piece has arrived. It makes the
   current stream wait for the copy (`Arrived.ready`) and returns the answer.

Three more kinds of threads exist. `vcrd-link-listener` accepts connections and runs one `vcrd-link-greeting` for each
(`connection.Listener`). `vcrd-link-stripe` sends or receives a part of a large tensor where `sockets` is above 1. A
further `vcrd-link-reader` per student rank waits in the teacher for the student's goodbye.

The death of a teacher is noticed in step 5, where a connection ends (`StudentConnections.lose`), and in step 6, where
nothing arrives within `timeout`. The death of a student is noticed in steps 2 and 4.
"""

from vcrd.settings import LinkSettings

from .errors import HandshakeRefused, LinkError, StudentLost, TeacherLost
from .handshake import Head, Identity, TeacherPlace, Tokenizer
from .plan import Piece, Place, Shard, Span, context_rows, overlaps, replica_of, students_of, vocab_shards
from .rendezvous import Rendezvous, host_rendezvous
from .requests import Request
from .student import StudentLink
from .teacher import TeacherLink
from .tracing import merge_traces, trace

__all__ = [
    "HandshakeRefused",
    "Head",
    "Identity",
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
    "TeacherPlace",
    "Tokenizer",
    "context_rows",
    "host_rendezvous",
    "merge_traces",
    "overlaps",
    "replica_of",
    "students_of",
    "trace",
    "vocab_shards",
]
