"""What a job states of tokenizer and weights: the same in every layout, another one for any other weight or token."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import jobs
import pytest
import torch
from worlds import World, run_worlds

from examples.demo.model import configure
from vcrd.link import Tokenizer
from vcrd.megatron.identity import tokenizer_of, weights_of
from vcrd.megatron.training_loop import training_loop

MODULUS = 1 << 62


def shares(changes: list[str]) -> list[int]:
    """This rank's share of the number for the tests' teacher, as it is and after each change."""
    from megatron.core import parallel_state

    found = []
    for change in ("none", *changes):
        part = jobs.model(jobs.TEACHER, seed=3 if change == "seed" else 2)
        with torch.no_grad():
            if change == "padding" and (part.pre_process or part.post_process):
                rows = part.shared_embedding_or_output_weight()
                rank = parallel_state.get_tensor_model_parallel_rank()
                rows[max(0, jobs.TRUE_VOCAB - rank * len(rows)) :] += 1.0
            change_alone(part, change)
        found.append(weights_of(part, jobs.TRUE_VOCAB))
    return found


def change_alone(part: torch.nn.Module, change: str) -> None:
    """Changes of a model that is one process's alone."""
    if change == "permuted":
        weight = part.shared_embedding_or_output_weight()
        weight[:45] = weight[:45].flip(0)
    elif change == "zeroed":
        part.shared_embedding_or_output_weight().zero_()
    elif change == "one bit":
        norm = part.decoder.layers[1].input_layernorm.weight
        norm[3] = torch.nextafter(norm[3], torch.tensor(9.0))
    elif change == "swapped layers":
        first, second = part.decoder.layers[0].mlp, part.decoder.layers[1].mlp
        ours, theirs = first.state_dict(), second.state_dict()
        ours = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in ours.items()
        }
        first.load_state_dict(theirs)
        second.load_state_dict(ours)
    elif change == "bfloat16":
        part.bfloat16()


def totals(ranks: list[list[int]]) -> list[int]:
    return [sum(of_rank) % MODULUS for of_rank in zip(*ranks, strict=True)]


def test_the_number_is_of_every_bit_and_place_and_the_same_in_every_layout():
    changes = ["seed", "permuted", "zeroed", "one bit", "swapped layers", "bfloat16"]
    everywhere = (["padding", "seed"],)
    alone, *layouts = run_worlds(
        World(shares, arguments=(changes,)),
        World(shares, arguments=everywhere),
        World(shares, 2, tensor=2, arguments=everywhere),
        World(shares, 2, pipeline=2, arguments=everywhere),
        World(shares, 4, tensor=2, pipeline=2, arguments=everywhere),
        World(shares, 2, arguments=everywhere),  # two data-parallel ranks
    )
    numbers = totals(alone)
    assert len(set(numbers)) == len(numbers) == len(changes) + 1
    *shared, replicas = layouts
    for ranks in shared:
        plain, padding, seed = totals(ranks)
        assert plain == padding == numbers[0] and seed == numbers[1]
    for rank in replicas:  # each is a whole teacher
        assert totals([rank])[0] == numbers[0]


def share_of_experts() -> int:
    """Of a model with experts and an untied output layer, whose weights do not depend on the layout."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = replace(
        configure(jobs.TEACHER, jobs.TEACHER.layers),
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type="allgather",
    )
    part = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm"),
        vocab_size=52,
        max_sequence_length=jobs.SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.fill_(0.3 if name.startswith("output_layer") else 0.7)
    return weights_of(part, jobs.TRUE_VOCAB)


def test_experts_and_an_output_layer_of_its_own_are_counted_once_in_each_layout():
    layouts = run_worlds(
        World(share_of_experts),
        World(share_of_experts, 2, tensor=2),
        World(share_of_experts, 2, pipeline=2),
    )
    alone, split, staged = (sum(ranks) % MODULUS for ranks in layouts)
    assert alone == split == staged != 0


def test_a_model_without_a_distributed_checkpoint_is_named():
    with pytest.raises(ValueError, match="model: expected a sharded_state_dict, got AttributeError"):
        weights_of(torch.nn.Linear(2, 2), 2)


VOCABULARY = {"the": 2, "a": 0, "##b": 1}


def holding(**attributes) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=3, **attributes)


def null_tokenizer(size: int):
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    return NullTokenizer(vocab_size=size)


def test_a_vocabulary_has_one_digest_however_a_library_keeps_it():
    ways = [
        holding(get_vocab=lambda: VOCABULARY),
        holding(vocab=VOCABULARY),
        holding(vocab=["a", "##b", "the"]),
        holding(inv_vocab={number: token for token, number in VOCABULARY.items()}),
        holding(vocab={token.encode(): number for token, number in VOCABULARY.items()}),
    ]
    digests = {tokenizer_of(way).digest for way in ways}
    assert len(digests) == 1 and all(len(digest) == 64 for digest in digests)
    permuted = tokenizer_of(holding(get_vocab=lambda: {**VOCABULARY, "the": 1, "##b": 2}))
    assert permuted.size == 3 and permuted.digest not in digests


def test_what_has_no_vocabulary_states_type_and_size():
    null = null_tokenizer(127)
    assert tokenizer_of(null) == Tokenizer("NullTokenizer", null.vocab_size)
    wrapped = SimpleNamespace(library="null", _tokenizer=null, vocab_size=null.vocab_size)
    assert tokenizer_of(wrapped) == tokenizer_of(null)
    with pytest.raises(
        TypeError, match="tokenizer: expected a tokenizer with a vocab_size or a vocabulary, got str"
    ):
        tokenizer_of("a path")


def test_megatrons_own_is_found_where_it_runs(monkeypatch):
    assert tokenizer_of() is None and training_loop() is None
    args = SimpleNamespace(load="/some/where")
    running = SimpleNamespace(
        _GLOBAL_ARGS=args, get_args=lambda: args, _GLOBAL_TOKENIZER=holding(vocab=VOCABULARY)
    )
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", running)
    assert tokenizer_of().digest == tokenizer_of(holding(vocab=VOCABULARY)).digest
    assert training_loop().arguments.load == "/some/where"
    running._GLOBAL_TOKENIZER = None
    assert tokenizer_of() is None
