"""The input of a plan: two models, their layouts, the hardware and the assumptions. Models and GPUs known by name.

Numbers only, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, with what determines its cost.

    params: all parameters. active: parameters that one token uses; fewer than params only with experts. hidden: width
    of the last hidden state. vocab: rows of the output layer. attention: heads times their width; the mean if queries
    and values have different widths. tied: input embedding and output layer are one matrix, counted once.
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
        """Parameters that a token is multiplied with. The input embedding is only a look-up."""
        return self.active if self.tied else self.active - self.vocab * self.hidden

    def forward_flops(self, sequence: int) -> int:
        """FLOPs per token: 2 per parameter, and causal attention over half of the sequence on average."""
        return 2 * self.multiplied + 2 * self.layers * self.attention * sequence

    @property
    def output_layer_flops(self) -> int:
        """FLOPs per token, forward."""
        return 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Gpu:
    """bf16, fp8: peak dense FLOP/s; fp8 is None for a GPU without FP8. memory: bytes. bandwidth: bytes/s of the memory.
    host: bytes/s from the host in one direction.
    """

    name: str
    bf16: float
    fp8: float | None
    memory: float
    bandwidth: float
    host: float


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The checked input of one plan.

    replicas: of the teacher; None for as many as needed. sequence, batch: of a micro-batch. teacher_context: tokens per
    sequence that only the teacher sees, on average. micro_batches: per step and data rank. network: bytes/s of one rank
    in each direction. over_nccl: responses travel over NCCL from GPU to GPU; otherwise over TCP through both hosts.
    teacher_mfu, student_mfu: reached share of the peak; that of the student includes its pipeline bubbles. recompute:
    the student repeats its forward pass in backward. vocab_multiple: the vocabulary is padded to a multiple of this
    times the tensor-parallel size, as in Megatron. cache_tokens: of the data whose answers are to be kept on disk; None
    for no cache. disk: bytes/s at which all student ranks together read.
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
    teacher_context: int = 0
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
    cache_tokens: int | None = None
    disk: float = 2e9

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
        """Tokens of one micro-batch."""
        return self.sequence * self.batch

    def served(self, replicas: int) -> int:
        """The largest number of data ranks per teacher replica."""
        return -(-self.student_data // replicas)

    @property
    def replica_gpus(self) -> int:
        return self.teacher_tensor * self.teacher_pipeline

    @property
    def student_gpus(self) -> int:
        return self.student_tensor * self.student_pipeline * self.student_context * self.student_data


def padded(vocab: int, multiple: int) -> int:
    return -(-vocab // multiple) * multiple


# Each row follows from the public config.json of the model on Hugging Face (meta-llama, Qwen, deepseek-ai,
# HuggingFaceTB). The number of parameters is that of the published checkpoint; for DeepSeek-R1 without its module for
# multi-token prediction. DeepSeek-R1's attention has 128 heads of 192 for queries and 128 for values.
_MODELS = (
    Model("SmolLM2-135M", 134_515_008, 134_515_008, 576, 30, 49_152, 576, tied=True),
    Model("SmolLM2-360M", 361_821_120, 361_821_120, 960, 32, 49_152, 960, tied=True),
    Model("SmolLM2-1.7B", 1_711_376_384, 1_711_376_384, 2048, 24, 49_152, 2048, tied=True),
    Model("Llama-3.2-1B", 1_235_814_400, 1_235_814_400, 2048, 16, 128_256, 2048, tied=True),
    Model("Llama-3.2-3B", 3_212_749_824, 3_212_749_824, 3072, 28, 128_256, 3072, tied=True),
    Model("Llama-3.1-8B", 8_030_261_248, 8_030_261_248, 4096, 32, 128_256, 4096),
    Model("Llama-3.1-70B", 70_553_706_496, 70_553_706_496, 8192, 80, 128_256, 8192),
    Model("Llama-3.1-405B", 405_853_388_800, 405_853_388_800, 16384, 126, 128_256, 16384),
    Model("Qwen3-0.6B", 596_049_920, 596_049_920, 1024, 28, 151_936, 2048, tied=True),
    Model("Qwen3-1.7B", 1_720_574_976, 1_720_574_976, 2048, 28, 151_936, 2048, tied=True),
    Model("Qwen3-4B", 4_022_468_096, 4_022_468_096, 2560, 36, 151_936, 4096, tied=True),
    Model("Qwen3-8B", 8_190_735_360, 8_190_735_360, 4096, 36, 151_936, 4096),
    Model("Qwen3-14B", 14_768_307_200, 14_768_307_200, 5120, 40, 151_936, 5120),
    Model("Qwen3-32B", 32_762_123_264, 32_762_123_264, 5120, 64, 151_936, 8192),
    Model("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704, 2048, 48, 151_936, 4096),
    Model("Qwen3-235B-A22B", 235_093_634_560, 22_190_763_520, 4096, 94, 151_936, 8192),
    Model("DeepSeek-R1", 671_026_419_200, 37_552_297_472, 7168, 61, 129_280, 20_480),
)

# From the data sheets of NVIDIA: tensor cores without sparsity (half of the number with it), PCIe in one direction
# (half of the number for both). A100 80GB SXM, H100 SXM, H200 SXM, one GPU of HGX B200.
_GPUS = (
    Gpu("a100", 312e12, None, 80e9, 2.039e12, 32e9),
    Gpu("h100", 989e12, 1979e12, 80e9, 3.35e12, 64e9),
    Gpu("h200", 989e12, 1979e12, 141e9, 4.8e12, 64e9),
    Gpu("b200", 2250e12, 4500e12, 180e9, 7.7e12, 64e9),
)

MODELS: Mapping[str, Model] = MappingProxyType({model.name: model for model in _MODELS})
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _GPUS})
