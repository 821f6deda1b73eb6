"""The demo's Megatron models equal the real model: the same logits as transformers, and no lost weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import World, run_worlds

from examples.demo import source
from examples.demo.convert import Place, load, to_hugging_face, to_megatron
from examples.demo.model import Shape, build, configure
from examples.demo.settings import KEPT_LAYERS

SMALL = Shape(
    layers=4,
    hidden=24,
    feed_forward=18,
    heads=6,
    groups=3,
    head_size=4,
    vocab_size=42,
    norm_epsilon=1e-5,
    rope_base=1e5,
)


def small_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "self_attn.q_proj": (24, 24),
        "self_attn.k_proj": (12, 24),
        "self_attn.v_proj": (12, 24),
        "self_attn.o_proj": (24, 24),
        "mlp.gate_proj": (18, 24),
        "mlp.up_proj": (18, 24),
        "mlp.down_proj": (24, 18),
        "input_layernorm": (24,),
        "post_attention_layernorm": (24,),
    }
    names = {f"model.layers.{n}.{name}.weight": size for n in range(4) for name, size in sizes.items()}
    names |= {"model.embed_tokens.weight": (42, 24), "model.norm.weight": (24,)}
    return {name: torch.randn(size, generator=generator) for name, size in names.items()}


@pytest.mark.parametrize("tensor_size", [1, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_shards_go_back_to_the_same_weights(tensor_size, stages):
    weights = small_weights()
    places = [
        Place(rank, tensor_size, stage, stages) for stage in range(stages) for rank in range(tensor_size)
    ]
    shards = {place: to_megatron(weights.__getitem__, SMALL, range(4), place) for place in places}
    back = to_hugging_face(shards, SMALL, 4)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


def test_an_impossible_split_is_an_error():
    with pytest.raises(ValueError, match="heads: expected a multiple of the tensor size 4, got 6"):
        to_megatron(small_weights().__getitem__, SMALL, range(4), Place(0, 4, 0, 1))
    with pytest.raises(ValueError, match="layers: expected a multiple of the 3 pipeline stages, got 4"):
        to_megatron(small_weights().__getitem__, SMALL, range(4), Place(0, 1, 0, 3))


@pytest.fixture(scope="module")
def real(demo_cache: Path):
    """(tokens [2, 96], full model's logits, shallow model's logits), from transformers."""
    problems = source.problems(demo_cache)
    tokens = torch.tensor([problem.tokens[:96] for problem in problems if len(problem.tokens) >= 96][:2])
    model = source.hugging_face_model()
    with torch.no_grad():
        full = model(tokens).logits
        model.model.layers = torch.nn.ModuleList(model.model.layers[n] for n in KEPT_LAYERS)
        model.config.num_hidden_layers = len(KEPT_LAYERS)
        shallow = model(tokens, use_cache=False).logits
    return tokens, full, shallow


def megatron_logits(cache: Path, kept: tuple[int, ...], tokens: torch.Tensor) -> torch.Tensor | None:
    """All logits [b, s, v] on the ranks of the last stage, through Megatron's schedule."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    shape = Shape.load(cache / "shape.json")
    model = build(shape, configure(shape, len(kept)), tokens.shape[1]).eval()
    with source.weights(cache) as fetch:
        load(model, fetch, shape, kept)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def forward_step(data_iterator, model):
        return model(tokens, positions, None), lambda logits, non_loss_data: logits

    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return (
        gather_from_tensor_model_parallel_region(collected[0])
        if parallel_state.is_pipeline_last_stage()
        else None
    )


@pytest.mark.slow
def test_teacher_of_two_stages_gives_the_real_logits(real, demo_cache):
    tokens, full, _ = real
    (ranks,) = run_worlds(
        World(megatron_logits, 2, pipeline=2, arguments=(demo_cache, tuple(range(30)), tokens))
    )
    torch.testing.assert_close(ranks[1], full, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_student_of_three_tensor_ranks_gives_the_shallow_models_logits(real, demo_cache):
    tokens, _, shallow = real
    (ranks,) = run_worlds(World(megatron_logits, 3, tensor=3, arguments=(demo_cache, KEPT_LAYERS, tokens)))
    for logits in ranks:
        torch.testing.assert_close(logits, shallow, atol=1e-3, rtol=0)
