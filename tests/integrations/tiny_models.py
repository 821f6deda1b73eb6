"""Tiny random models of transformers, a tokenizer, batches with masked labels, and the reference's loss of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vcrd.loss import reference

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 37  # true tokens
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 5.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.5}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
}


def model(family: str = "llama", *, columns: int = 40, seed: int = 1, **changes) -> torch.nn.Module:
    """Float32, eager attention, no dropout; `columns` is the padded vocabulary."""
    kind, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = kind(**{**SHAPE, "vocab_size": columns, **own, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each true token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", "<pad>", *(f"w{n}" for n in range(3, VOCABULARY))]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w3"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, padding_side="left", **special)


def rows(count: int = 4, length: int = 9, seed: int = 3) -> dict[str, torch.Tensor]:
    """Labels of each row begin elsewhere, and some row has one label alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : (3 * row) % length] = -100
    labels[-1, :-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def reference_losses(student, teacher, batch, *, validity="label", steps=None, scores=None, **options):
    """The reference's loss of each token, [batch, sequence - 1], and which of them count."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = (model(**inputs).logits[:, :-1].double() for model in (student, teacher))
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    stats = reference.statistics(q, p.detach(), labels, vocab_size=VOCABULARY, mask=mask, **options)
    log_v = reference.log_validities(stats, validity) if scores is None else [v[:, 1:].log() for v in scores]
    weight, _ = reference.weights(*log_v, mask=mask, steps=None if steps is None else steps[:, 1:])
    return weight * stats["divergence"], mask


def gradients(loss, student, keep: bool = False) -> list[torch.Tensor]:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)]


def assert_close(found: list[torch.Tensor], truth: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    """Within this part of the largest value of all."""
    scale = max(value.abs().max() for value in truth)
    assert scale > 0
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double() / scale, other.double() / scale, atol=tolerance, rtol=0)


def code_of_the_page(name: str) -> str:
    """The Python block of docs/integrations/transformers.md with this name in it."""
    page = Path(__file__).parents[2] / "docs/integrations/transformers.md"
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if name in code
    ]
    return code
