"""The costs of each payload: bytes, seconds, memory, teacher GPUs. Bytes are exact, seconds come from a model.

The model, per micro-batch of one data rank:

- The student computes 3 times its forward FLOPs (4 with recompute) on tp x pp x cp GPUs.
- The loss on its last stage also reads the response: `loss_seconds`.
- The teacher computes its forward FLOPs on tp x pp GPUs, for every data rank that the replica serves. Requests pass
  through its stages in groups, and its pipeline has a bubble.
- At the same time the network carries the response, and over TCP, PCIe carries it to the student GPU. The busiest rank
  of either job counts.

The slowest of student, teacher, network and PCIe determines the time. If that is not the student, the student waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vcrd.link.payload import PAYLOADS, Payload, payload_named
from vcrd.plan.scenario import Scenario
from vcrd.plan.traffic import Traffic

# Constants of other modules, which are not imported here. A test checks that they are equal.
RESPONSES_UNDER_WAY = 4  # vcrd.link.respond: responses that a teacher rank holds while it sends them
BLOCK_BYTES = (
    31 << 20
)  # vcrd.loss.teacher_blocks: float32 logits of a block, made from top-k or hidden states
ASSEMBLY_BYTES = 1 << 22  # vcrd.link.reassembly: received at once, where a piece is not all columns of a rank

# The loss reads the teacher once in forward and once in backward. Divergences with a mixture need one more pass.
_PASSES = 2
# Bytes of GPU memory traffic per logit with top-k. Three times, the student logits (2 bytes, bfloat16) are copied to a
# float32 block, which is then read. The first pass also reads the student logits again.
_TOP_K_TRAFFIC = 3 * (2 + 4 + 4) + 2
_BLOCK_TRAFFIC = 4 + 4  # a float32 block is written and read

_ERRORS = {
    "float32": "none",
    "hidden": "none",
    "float16": "d / 2048",
    "logits_8bit": "0.019 sqrt(d)",
    "topk": "tail's shape",
}


@dataclass(frozen=True)
class Cost:
    """The costs of one payload. Bytes and seconds are per micro-batch of one data rank if nothing else is said.

    received: into the busiest student rank. sent: out of the busiest teacher rank. step_bytes: all responses of one
    step to all data ranks. once_bytes: the output layer, sent when the student starts. network_seconds: of the busiest
    rank. loss_seconds: time that this payload adds on the last student stage. student_seconds: compute and loss of the
    student. teacher_seconds: of one replica, with its bubble. replicas: those given, or those needed, or one per data
    rank if no number suffices. round_seconds: time of a micro-batch with these replicas. step_seconds: of a step.
    waiting: share of that time that the student waits. idle: share of that time that the teacher GPUs do not compute,
    the mean over the replicas; bubbles count. *_gpu_bytes, *_host_bytes: memory of one rank. replicas_needed,
    gpus_needed: the fewest with which the student never waits; None if no number of replicas suffices. least_gpus: GPUs
    for the FLOPs of the teacher alone, in any layout. error: upper bound for a logit that is d below the row maximum.
    """

    payload: str
    received: int
    sent: int
    step_bytes: int
    once_bytes: int
    network_seconds: float
    loss_seconds: float
    student_seconds: float
    teacher_seconds: float
    round_seconds: float
    waiting: float
    idle: float
    step_seconds: float
    student_gpu_bytes: int
    student_host_bytes: int
    teacher_gpu_bytes: int
    teacher_host_bytes: int
    replicas: int
    replicas_needed: int | None
    gpus_needed: int | None
    least_gpus: int
    error: str

    @property
    def network_share(self) -> float:
        """Share of the time in which the network of the busiest rank is in use."""
        return self.network_seconds / self.round_seconds

    @property
    def loss_share(self) -> float:
        """Time that this payload adds to the compute of the student, as a share of it."""
        return self.loss_seconds / (self.student_seconds - self.loss_seconds)


def costs(scenario: Scenario) -> tuple[Cost, ...]:
    """The costs of every payload, in the order of `payload.PAYLOADS`."""
    return tuple(cost(scenario, payload) for payload in PAYLOADS)


def cost(scenario: Scenario, payload: Payload) -> Cost:
    payload = payload.sized(top_k=scenario.top_k, state_size=scenario.teacher.hidden)
    traffic = traffic_of(scenario, payload)
    shape = scenario.sequence, scenario.batch
    received, sent = traffic.into_busiest(shape), traffic.out_of_busiest(shape, scenario.student_data)
    loss = loss_seconds(scenario, payload, traffic.widest)
    student = student_seconds(scenario) + loss
    needed = replicas_needed(scenario, traffic, student)
    replicas = scenario.replicas or needed or scenario.student_data
    enters, leaves = received / scenario.network, traffic.out_of_busiest(shape, replicas) / scenario.network
    teacher = teacher_seconds(scenario, payload.name, replicas)
    round_seconds = max(
        student, enters, leaves, _upload(scenario, traffic), scenario.served(replicas) * teacher
    )
    return Cost(
        payload=payload.name,
        received=received,
        sent=sent,
        step_bytes=scenario.student_data
        * scenario.micro_batches
        * sum(flow.bytes for flow in traffic.response(shape)),
        once_bytes=scenario.student_data * sum(flow.bytes for flow in traffic.output_layer()),
        network_seconds=max(enters, leaves),
        loss_seconds=loss,
        student_seconds=student,
        teacher_seconds=teacher,
        round_seconds=round_seconds,
        waiting=1 - student / round_seconds,
        idle=_idle(scenario, payload.name, replicas, round_seconds),
        step_seconds=round_seconds * scenario.micro_batches,
        student_gpu_bytes=student_gpu_bytes(scenario, traffic),
        student_host_bytes=student_host_bytes(scenario, traffic),
        teacher_gpu_bytes=RESPONSES_UNDER_WAY * sent if scenario.over_nccl else sent,
        teacher_host_bytes=teacher_host_bytes(scenario, payload, sent),
        replicas=replicas,
        replicas_needed=needed,
        gpus_needed=None if needed is None else needed * scenario.replica_gpus,
        least_gpus=math.ceil(scenario.student_data * teacher_gpu_seconds(scenario, payload.name) / student),
        error=_ERRORS[payload.name],
    )


def _idle(scenario: Scenario, payload: str, replicas: int, round_seconds: float) -> float:
    busy = scenario.student_data * teacher_gpu_seconds(scenario, payload)
    return 1 - busy / (replicas * scenario.replica_gpus * round_seconds)


def student_step_seconds(scenario: Scenario, payload: Payload) -> float:
    """A step of the student whose answers are ready. payload: with its sizes."""
    loss = loss_seconds(scenario, payload, traffic_of(scenario, payload).widest)
    return scenario.micro_batches * (student_seconds(scenario) + loss)


def colocated_step_seconds(scenario: Scenario) -> float:
    """A step with the teacher in the student's own ranks, which compute one model after the other and read
    the teacher's logits in 16 bits. The memory of the teacher's weights is not counted."""
    student = student_step_seconds(scenario, payload_named("float16"))
    # The same FLOPs, on the GPUs of the student.
    there = replace(scenario, teacher_gpu=scenario.student_gpu)
    gpus = scenario.student_gpus // scenario.student_data
    return student + scenario.micro_batches * teacher_gpu_seconds(there, "float16") / gpus


def traffic_of(scenario: Scenario, payload: Payload) -> Traffic:
    return Traffic(
        payload=payload,
        vocab_size=scenario.vocab,
        teacher_padded=scenario.teacher_padded,
        teacher_tensor=scenario.teacher_tensor,
        student_padded=scenario.student_padded,
        student_tensor=scenario.student_tensor,
        context_size=scenario.student_context,
        data_size=scenario.student_data,
    )


def student_seconds(scenario: Scenario) -> float:
    """Forward and backward of a micro-batch on the student GPUs of one data rank, without the loss."""
    flops = scenario.student.forward_flops(scenario.sequence) * scenario.tokens
    gpu = scenario.student_gpu
    peak = gpu.fp8 if scenario.student_fp8 else gpu.bf16
    gpus = scenario.student_tensor * scenario.student_pipeline * scenario.student_context
    return flops * (4 if scenario.recompute else 3) / (gpus * peak * scenario.student_mfu)


def teacher_seconds(scenario: Scenario, payload: str, replicas: int) -> float:
    """Forward pass of a micro-batch on one replica, if its pipeline always works on full groups.

    `vcrd.megatron.serve` forms groups of up to two micro-batches per stage, and never more than the credits allow.
    """
    stages = scenario.teacher_pipeline
    group = min(2 * stages, scenario.credits * scenario.served(replicas))
    return teacher_gpu_seconds(scenario, payload) / scenario.replica_gpus * (group + stages - 1) / group


def teacher_gpu_seconds(scenario: Scenario, payload: str) -> float:
    """Seconds of one teacher GPU for a forward pass of a micro-batch, without padding.

    Its layers compute all tokens that it sees, its output layer those of the student.
    """
    output, seen = scenario.teacher.output_layer_flops, scenario.sequence + scenario.teacher_context
    flops = (scenario.teacher.forward_flops(seen) - output) * seen
    if payload != "hidden":  # there the student computes the logits
        flops += output * scenario.sequence
    peak = scenario.teacher_gpu.fp8 if scenario.teacher_fp8 else scenario.teacher_gpu.bf16
    return flops * scenario.batch / (peak * scenario.teacher_mfu)


def loss_seconds(scenario: Scenario, payload: Payload, columns: int) -> float:
    """Time that the last student stage needs to read the payload in the loss."""
    bandwidth = scenario.student_gpu.bandwidth
    tokens = scenario.tokens // scenario.student_context
    if payload.name == "topk":
        return tokens * columns * _TOP_K_TRAFFIC / bandwidth
    if payload.name == "hidden":
        return _PASSES * (tokens * columns * _BLOCK_TRAFFIC / bandwidth + _product(scenario, columns))
    return _PASSES * payload.bytes(tokens, columns) / bandwidth


def _upload(scenario: Scenario, traffic: Traffic) -> float:
    """Seconds from the host to the GPU, while the student computes. Only TCP takes that path."""
    if scenario.over_nccl:
        return 0.0
    tokens = scenario.tokens // scenario.student_context
    return traffic.payload.bytes(tokens, traffic.widest) / scenario.student_gpu.host


def _product(scenario: Scenario, columns: int) -> float:
    """Seconds of hidden states times output layer, in blocks. Each block reads the whole output layer of the rank."""
    gpu, size = scenario.student_gpu, scenario.teacher.hidden
    left, rows, seconds = scenario.tokens // scenario.student_context, block_rows(columns), 0.0
    full, rest = divmod(left, rows)
    for count, height in ((full, rows), (1, rest)):
        flops = 2 * height * columns * size / (gpu.bf16 * scenario.student_mfu)
        seconds += count * max(flops, 2 * columns * size / gpu.bandwidth if height else 0.0)
    return seconds


def block_rows(columns: int) -> int:
    """Tokens of a block of float32 logits."""
    return max(1, BLOCK_BYTES // (4 * columns))


def replicas_needed(scenario: Scenario, traffic: Traffic, student: float) -> int | None:
    """The fewest replicas whose compute and network are as fast as the student; None if one per data rank is too slow.

    student: seconds of the student per micro-batch.
    """
    shape, ranks = (scenario.sequence, scenario.batch), scenario.student_data
    if max(traffic.into_busiest(shape) / scenario.network, _upload(scenario, traffic)) > student:
        return None
    # More replicas help only if the largest number of data ranks per replica becomes smaller.
    for replicas in sorted({-(-ranks // served) for served in range(1, ranks + 1)}):
        computes = scenario.served(replicas) * teacher_seconds(scenario, traffic.payload.name, replicas)
        sends = traffic.out_of_busiest(shape, replicas) / scenario.network
        if max(computes, sends) <= student:
            return replicas
    return None


def student_gpu_bytes(scenario: Scenario, traffic: Traffic) -> int:
    """On a GPU of the last stage: the response in use, those that the credits allow, and the temporaries of the loss.

    Over NCCL also one buffer of the size of a piece for each sender whose pieces have fewer columns than the rank.
    """
    payload, columns = traffic.payload, traffic.widest
    tokens = scenario.tokens // scenario.student_context
    used = (scenario.credits + 1) * payload.bytes(tokens, columns)
    if not payload.whole:
        return used + (_most_assembled(traffic, tokens, None) if scenario.over_nccl else 0)
    used += 4 * columns * min(tokens, block_rows(columns))
    if payload.name == "topk":
        return used + 12 * payload.top_k * tokens  # int64 tokens, and a second copy of the logarithms
    return used + payload.bytes(columns, 0)  # the output layer: one row per column, as wide as a state


def student_host_bytes(scenario: Scenario, traffic: Traffic) -> int:
    """On the host of a rank of the last stage: the output layer; over TCP also the responses that arrive and the
    buffers for their pieces.
    """
    payload = traffic.payload
    tokens = scenario.tokens // scenario.student_context
    held = payload.bytes(traffic.widest, 0) if payload.name == "hidden" else 0
    if scenario.over_nccl:
        return held
    held += scenario.credits * payload.bytes(tokens, traffic.widest)
    return held if payload.whole else held + _most_assembled(traffic, tokens, ASSEMBLY_BYTES)


def _most_assembled(traffic: Traffic, tokens: int, most: int | None) -> int:
    """Bytes of the buffers, one per sender, for pieces that are narrower than the columns of the rank; on the rank with
    the largest sum. most: bytes of one buffer, which holds at least one row; None for whole pieces.
    """
    return max(_assembled(traffic, tokens, most, rank) for rank in range(traffic.student_tensor))


def _assembled(traffic: Traffic, tokens: int, most: int | None, rank: int) -> int:
    mine, total = traffic.student_shards[rank], 0
    for theirs in traffic.teacher_shards:
        width = min(mine.stop, theirs.stop) - max(mine.start, theirs.start)
        if 0 < width < mine.width:
            row = traffic.payload.bytes(1, width)
            total += row * (tokens if most is None else min(tokens, max(1, most // row)))
    return total


def teacher_host_bytes(scenario: Scenario, payload: Payload, sent: int) -> int:
    """On the host of a rank of the last stage: its shard of the output layer, and over TCP the responses being sent."""
    held = 0 if scenario.over_nccl else RESPONSES_UNDER_WAY * sent
    if payload.name == "hidden":
        held += payload.bytes(scenario.teacher_padded // scenario.teacher_tensor, 0)
    return held
