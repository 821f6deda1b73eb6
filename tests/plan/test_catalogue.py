"""The known models, computed again from their architecture."""

from __future__ import annotations

import pytest

from vcrd.plan.scenario import GPUS, MODELS

# layers, hidden, heads, key-value heads, head width, feed-forward width, vocabulary, tied, norms of query and key.
DENSE = {
    "SmolLM2-135M": (30, 576, 9, 3, 64, 1536, 49152, True, False),
    "SmolLM2-360M": (32, 960, 15, 5, 64, 2560, 49152, True, False),
    "SmolLM2-1.7B": (24, 2048, 32, 32, 64, 8192, 49152, True, False),
    "Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128256, True, False),
    "Llama-3.2-3B": (28, 3072, 24, 8, 128, 8192, 128256, True, False),
    "Llama-3.1-8B": (32, 4096, 32, 8, 128, 14336, 128256, False, False),
    "Llama-3.1-70B": (80, 8192, 64, 8, 128, 28672, 128256, False, False),
    "Llama-3.1-405B": (126, 16384, 128, 8, 128, 53248, 128256, False, False),
    "Qwen3-0.6B": (28, 1024, 16, 8, 128, 3072, 151936, True, True),
    "Qwen3-1.7B": (28, 2048, 16, 8, 128, 6144, 151936, True, True),
    "Qwen3-4B": (36, 2560, 32, 8, 128, 9728, 151936, True, True),
    "Qwen3-8B": (36, 4096, 32, 8, 128, 12288, 151936, False, True),
    "Qwen3-14B": (40, 5120, 40, 8, 128, 17408, 151936, False, True),
    "Qwen3-32B": (64, 5120, 64, 8, 128, 25600, 151936, False, True),
}
# layers, hidden, heads, key-value heads, width of an expert: 128 experts, 8 of them at a time.
EXPERTS = {
    "Qwen3-30B-A3B": (48, 2048, 32, 4, 768),
    "Qwen3-235B-A22B": (94, 4096, 64, 4, 1536),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_models(name):
    layers, hidden, heads, pairs, width, inner, vocab, tied, norms = DENSE[name]
    attention = 2 * hidden * heads * width + 2 * hidden * pairs * width + (2 * width if norms else 0)
    params = layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden
    params += vocab * hidden * (1 if tied else 2)
    model = MODELS[name]
    assert (model.params, model.active) == (params, params)
    assert (model.layers, model.hidden, model.vocab, model.tied) == (layers, hidden, vocab, tied)
    assert model.attention == heads * width
    # All parameters except norms and a look-up: the output layer and the matrices of the layers.
    matrices = layers * (attention + 3 * hidden * inner) + vocab * hidden
    assert model.multiplied == pytest.approx(matrices, rel=1e-3)


@pytest.mark.parametrize("name", EXPERTS)
def test_models_of_experts(name):
    layers, hidden, heads, pairs, inner = EXPERTS[name]
    attention = 2 * hidden * heads * 128 + 2 * hidden * pairs * 128 + 256
    outside = layers * (attention + 2 * hidden + 128 * hidden) + hidden + 2 * 151936 * hidden
    model = MODELS[name]
    assert model.params == outside + layers * 128 * 3 * hidden * inner
    assert model.active == outside + layers * 8 * 3 * hidden * inner
    assert (model.layers, model.hidden, model.attention) == (layers, hidden, heads * 128)


def test_deepseek_r1():
    """61 layers, the first 3 dense; latent attention of 128 heads: 1536 for queries, 512 and 64 for keys and values."""
    hidden, latent = 7168, 512
    attention = hidden * 1536 + 1536 + 1536 * 128 * (128 + 64)
    attention += hidden * (latent + 64) + latent + latent * 128 * (128 + 128) + 128 * 128 * hidden
    outside = 61 * (attention + 2 * hidden) + 3 * 3 * hidden * 18432 + 58 * (256 * hidden + 256)
    outside += hidden + 2 * 129280 * hidden
    model, expert = MODELS["DeepSeek-R1"], 3 * hidden * 2048
    assert model.params == outside + 58 * 257 * expert
    assert model.active == outside + 58 * 9 * expert
    assert 2 * model.attention == 128 * (192 + 128)


def test_this_file_has_every_model():
    assert set(MODELS) == {*DENSE, *EXPERTS, "DeepSeek-R1"}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_gpus_are_in_bytes_and_flops(gpu):
    assert 1e14 < gpu.bf16 < 1e16 and gpu.fp8 in (None, pytest.approx(2 * gpu.bf16, rel=0.01))
    assert 1e9 < gpu.host < gpu.memory < gpu.bandwidth < 1e13
