"""Faults in the link between the jobs, and in the plug into Megatron."""

from __future__ import annotations

from faults import LINK, Fault

_PLAN = "tests/link/test_plan.py"
_TRANSPORT = "tests/link/test_transport.py"
_LINK = "tests/link/test_link.py"
_LAYOUTS = "tests/link/test_layouts.py"
_OUTSIDE = "tests/megatron/test_external_validity.py"
_METRICS = "tests/megatron/test_metrics.py"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, LINK, f"vcrd/{file}", old, new, tests)


FAULTS = [
    _fault(
        "a piece of one column is not planned",
        "link/plan.py",
        "            if start < stop:\n                pieces.append(Piece(sender, receiver, start, stop))",
        "            if start < stop - 1:\n                pieces.append(Piece(sender, receiver, start, stop))",
        _PLAN,
        "-k",
        "arrives_exactly_once or arrives_once_in_order",
    ),
    _fault(
        "the two chunks of a context rank changed places",
        "link/plan.py",
        "for chunk in (context_rank, 2 * context_size - 1 - context_rank):",
        "for chunk in (2 * context_size - 1 - context_rank, context_rank):",
        _PLAN,
        "-k",
        "context_ranks",
    ),
    _fault(
        "one micro-batch more than the credits allow is asked for",
        "link/student_connections.py",
        "self._sent - min(self.taken, settled) < self._handshake.credits",
        "self._sent - min(self.taken, settled) <= self._handshake.credits",
        _LINK,
        "-k",
        "credits",
    ),
    _fault(
        "bytes of an epoch that is over are taken for the new one's",
        "link/reassembly.py",
        "        if epoch != self._epoch:",
        "        if epoch > self._epoch:",
        "tests/link/test_buffers.py",
        "-k",
        "answer or epoch",
    ),
    _fault(
        "the maxima of a sequence's first positions are taken for every context rank's",
        "link/teacher.py",
        "shift = None if top is None else _rows(top, spans)",
        "shift = None if top is None else top[: parts[0].shape[0]]",
        _LAYOUTS,
        "-k",
        "part_of_the_truth and (float16 or 8bit)",
    ),
    _fault(
        "a rank that has an answer is sent it again by a teacher that came back",
        "link/teacher_session.py",
        'firsts = {place: reply["first"] for place, reply in replies.items()}',
        "firsts = dict.fromkeys(replies, 0)",
        "tests/link/test_return.py",
        "-k",
        "one_rank_lacks",
    ),
    _fault(
        "a teacher whose answer is still arriving is lost at the timeout",
        "link/student.py",
        "left = max(begun, session.heard) + self._settings.timeout - now",
        "left = begun + self._settings.timeout - now",
        _LINK,
        "-k",
        "keeps_arriving",
    ),
    _fault(
        "the seal of a greeting does not cover the challenge",
        "link/connection.py",
        'message = b"|".join([role, first, second, str(protocol).encode(), text])',
        'message = b"|".join([role, str(protocol).encode(), text])',
        "tests/link/test_wire.py",
        "-k",
        "overheard",
    ),
    _fault(
        "the loss mask is read in the wrong order, not transposed",
        "megatron/distillation.py",
        "mask = given = loss_mask.transpose(0, 1)",
        "mask = given = loss_mask.reshape(loss_mask.shape[::-1])",
        "tests/megatron/test_distillation.py",
        "-k",
        "tensor_and_pipeline_parallel",
    ),
    _fault(
        "steps of two samples share their numbers",
        "megatron/external_validity.py",
        "(sample * 2**32 + steps)[named]",
        "steps[named]",
        _OUTSIDE,
        "-k",
        "context_parallel",
    ),
    _fault(
        "fields are taken from global rank 0, not from the group's first",
        "megatron/external_validity.py",
        "dist.broadcast(message, dist.get_global_rank(group, 0), group=group)",
        "dist.broadcast(message, 0, group=group)",
        _OUTSIDE,
        "-k",
        "weights_and_gradients",
    ),
    _fault(
        "the edges of packed samples all begin at 0",
        "megatron/packing.py",
        "merged.append(row + width * number)",
        "merged.append(row)",
        "tests/megatron/test_payloads.py",
        "-k",
        "edges",
    ),
    _fault(
        "figures leave out the tokens of other context ranks",
        "megatron/metrics.py",
        "report.take(self._layout.groups.data_context)",
        "report.take(self._layout.groups.data)",
        _METRICS,
        "-k",
        "context_ranks",
    ),
    _fault(
        "figures are those of one rank",
        "megatron/report.py",
        "            dist.all_reduce(sums, group=group)\n",
        "",
        "tests/megatron/test_distillation.py",
        "-k",
        "data_parallel_student",
    ),
    _fault(
        "every tensor rank counts the invalid rows again",
        "megatron/distillation.py",
        "and not self.measuring and self.layout.tensor_rank == 0:",
        "and not self.measuring:",
        "tests/megatron/test_invalid_rows.py",
        "-k",
        "stop",
    ),
    _fault(
        "a piece that is narrower than the shard is received in parts, and sent whole",
        "link/transport/nccl.py",
        "        self._transfer(self._communicator.receive, target, self._wait)\n        if",
        "        for part in target.split(2):\n"
        "            self._transfer(self._communicator.receive, part, self._wait)\n        if",
        _TRANSPORT,
        "-k",
        "whatever_its_shape",
    ),
    _fault(
        "what was received is copied to its columns at once, not after the transfer",
        "link/transport/nccl.py",
        "self._stream.copy(tensor[..., columns], target)",
        "tensor[..., columns].copy_(target)",
        _TRANSPORT,
        "-k",
        "whatever_its_shape",
    ),
    _fault(
        "an empty tensor is sent to a rank that holds only padding",
        "link/transport/__init__.py",
        "            if not part.is_empty:\n                self._send",
        "            if True:\n                self._send",
        _TRANSPORT,
        "-k",
        "whatever_its_shape",
    ),
    _fault(
        "a rank that waits for a transfer does not look at the connection",
        "link/transport/nccl.py",
        "            if self.connection.is_over:\n                raise",
        "            if False:\n                raise",
        _TRANSPORT,
        "-k",
        "sees_that_the_other_one_is_gone",
    ),
    _fault(
        "one pair of a replica uses NCCL while another one falls back to TCP",
        "link/teacher_session.py",
        '        _opened(replica_group, session, "tcp", reason)\n',
        "        pass\n",
        _TRANSPORT,
        "-k",
        "takes_all_of_the_replica",
    ),
]
