"""What is planned for: two models, their layouts, the hardware, and the assumptions. Numbers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, as far as its cost goes.

    params: all of them. active: those that one token meets (fewer only with experts). hidden: width of the last hidden
    state. vocab: rows of the output layer. attention: heads times their width (the mean of the query's and the
    value's where these differ). tied: input embedding and output layer are one matrix, counted once.
    """

    name: str
    params: int
    active: int
    hidden: int
    layers: int
    vocab: int
    attention: int
    tied: bool = False

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: the input embedding is only looked up."""
        return self.active if self.tied else self.active - self.vocab * self.hidden

    def forward_flops(self, sequence: int) -> int:
        """Of one token, in sequences of that many: 2 a parameter, and causal attention over half of them on average."""
        return 2 * self.multiplied + 2 * self.layers * self.attention * sequence

    @property
    def output_layer_flops(self) -> int:
        """Of one token, forward."""
        return 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Gpu:
    """Peak dense FLOP/s; memory in bytes; bytes/s of that memory, and from the host in one direction.

    fp8: None where there is none.
    """

    name: str
    bf16: float
    fp8: float | None
    memory: float
    bandwidth: float
    host: float


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One plan's input, already valid.

    replicas: of the teacher; None for as many as are needed. sequence, batch: of a micro-batch. micro_batches: per step
    and data rank. network: bytes/s of one rank in each direction. over_nccl: responses travel from GPU to GPU, and
    otherwise over TCP through both hosts. teacher_mfu, student_mfu: share of the peak that is reached, pipeline bubbles
    of the student included. recompute: the student runs its forward pass once more in backward. vocab_multiple: the
    vocabulary is padded to a multiple of this times the tensor-parallel size, as Megatron does.
    """

    teacher: Model
    student: Model
    teacher_gpu: Gpu
    student_gpu: Gpu
    teacher_tensor: int = 1
    teacher_pipeline: int = 1
    replicas: int | None = None
    student_tensor: int = 1
    student_pipeline: int = 1
    student_context: int = 1
    student_data: int = 1
    student_expert: int = 1
    sequence: int = 4096
    batch: int = 1
    micro_batches: int = 8
    credits: int = 2
    top_k: int = 64
    network: float = 5e9
    over_nccl: bool = True
    teacher_mfu: float = 0.4
    student_mfu: float = 0.4
    teacher_fp8: bool = False
    student_fp8: bool = False
    recompute: bool = False
    vocab_multiple: int = 128

    @property
    def vocab(self) -> int:
        return self.teacher.vocab

    @property
    def teacher_padded(self) -> int:
        return padded(self.vocab, self.vocab_multiple * self.teacher_tensor)

    @property
    def student_padded(self) -> int:
        return padded(self.vocab, self.vocab_multiple * self.student_tensor)

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.sequence * self.batch

    def served(self, replicas: int) -> int:
        """The most data ranks that one of so many teacher replicas serves."""
        return -(-self.student_data // replicas)

    @property
    def replica_gpus(self) -> int:
        return self.teacher_tensor * self.teacher_pipeline

    @property
    def student_gpus(self) -> int:
        return self.student_tensor * self.student_pipeline * self.student_context * self.student_data


def padded(vocab: int, multiple: int) -> int:
    return -(-vocab // multiple) * multiple
