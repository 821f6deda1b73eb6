"""Models and GPUs that the plan knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vcrd.plan.scenario import Gpu, Model

# Each row follows from the model's public config.json on Hugging Face (meta-llama, Qwen, deepseek-ai,
# HuggingFaceTB). The number of parameters is that of the published checkpoint, of DeepSeek-R1 without its module for
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

# NVIDIA's data sheets: tensor cores without sparsity (half of what is printed with it), PCIe in one direction (half of
# what is printed for both). A100 80GB SXM, H100 SXM, H200 SXM, one GPU of HGX B200.
_GPUS = (
    Gpu("a100", 312e12, None, 80e9, 2.039e12, 32e9),
    Gpu("h100", 989e12, 1979e12, 80e9, 3.35e12, 64e9),
    Gpu("h200", 989e12, 1979e12, 141e9, 4.8e12, 64e9),
    Gpu("b200", 2250e12, 4500e12, 180e9, 7.7e12, 64e9),
)

MODELS: Mapping[str, Model] = MappingProxyType({model.name: model for model in _MODELS})
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _GPUS})
