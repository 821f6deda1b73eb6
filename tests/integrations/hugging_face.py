"""Tiny random Hugging Face checkpoints with a tokenizer and a chat template, and chats for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{number}" for number in range(80)]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<unk>", "system", "user", "assistant"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }} <|im_end|> {% endgeneration %}{% else %}{{ message.content }} <|im_end|> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
VOCABULARY = 99  # odd, so that tensor parallelism needs padding; more than the tokenizer has


def save(folder: Path, kind: str, seed: int = 0, layers: int = 4, **config: Any) -> Path:
    """A checkpoint of the transformers class {kind}ForCausalLM, with weights large enough to be told apart."""
    import transformers

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    configuration = getattr(transformers, f"{kind}Config")(**{**shape, **config})
    getattr(transformers, f"{kind}ForCausalLM")(configuration).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_chats(folder: Path, count: int, seed: int = 0) -> Path:
    """training.jsonl with chats of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    with (folder / "training.jsonl").open("w") as file:
        for _ in range(count):
            user, assistant = (" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(2))
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder
