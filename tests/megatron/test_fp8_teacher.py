"""What is said of a teacher in FP8, without the GPU that it needs: a configuration is enough to refuse it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vcrd.megatron.compatibility import refuse_delayed_scaling, refuse_uneven_tokens
from vcrd.megatron.serving import ServedHead


def config(recipe: str = "tensorwise", **more) -> SimpleNamespace:
    return SimpleNamespace(**{"fp8": "hybrid", "fp8_recipe": recipe, "tensor_model_parallel_size": 4, **more})


def test_delayed_scaling_is_refused():
    from megatron.core.enums import Fp8Recipe

    for recipe in ("delayed", Fp8Recipe.delayed):
        with pytest.raises(
            ValueError, match="^fp8_recipe: expected 'tensorwise', 'blockwise' or 'mxfp8' for a"
        ):
            refuse_delayed_scaling(config(recipe))
    refuse_delayed_scaling(config("blockwise"))
    refuse_delayed_scaling(config("delayed", fp8=None))


@pytest.mark.parametrize(
    ("recipe", "sequence_parallel", "multiple"),
    [("tensorwise", False, 8), ("blockwise", True, 32), ("mxfp8", False, 32), ("mxfp8", True, 128)],
)
def test_micro_batches_are_multiples_of_what_a_product_takes(recipe, sequence_parallel, multiple):
    given = config(recipe, sequence_parallel=sequence_parallel)
    refuse_uneven_tokens(given, 2, multiple // 2)
    with pytest.raises(
        ValueError, match=f"^tokens: expected micro-batches of a multiple of {multiple} tokens, "
    ):
        refuse_uneven_tokens(given, 3, multiple // 2)
    refuse_uneven_tokens(config(recipe, fp8=None), 3, multiple // 2)


def test_an_output_layer_in_fp8_does_not_send_hidden_states():
    chunk = SimpleNamespace(output_layer=object(), config=config("mxfp8", fp8_output_proj=True))
    with pytest.raises(ValueError, match="^payload 'hidden': expected fp8_output_proj False, .* got True"):
        ServedHead(chunk, None)
