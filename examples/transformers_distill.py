"""The loss in a plain Hugging Face loop on one device, without Megatron.

    python examples/transformers_distill.py [--student NAME --teacher NAME --text FILE]

NAME is the name or folder of a causal language model; both models need the same tokenizer. Without options it uses tiny
random models and tokens. For the Trainer of transformers and those of TRL, with gradient accumulation and several
processes, there are subclasses of them in `vcrd.integrations`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from vcrd.integrations.transformers import DistillationLoss


def mean_loss(loss, student, batch):
    """Over the tokens with a label. batch: input_ids, attention_mask and labels, [b, s]; -100 is no label.

    One micro-batch of several is not to be divided by its own tokens, but by those of all of them.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = loss(student, inputs, batch["labels"])
    return out.loss.sum() / (batch["labels"][:, 1:] != -100).sum()


def load(name, hidden):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 2, "vocab_size": 128}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.2)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("student", "teacher", "text"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = load(options.student, 32).to(device), load(options.teacher, 64).to(device)
    ids, tokenizer = torch.randint(128, (30 * 4 * 32,)), None
    if options.text:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        ids = torch.tensor(tokenizer(Path(options.text).read_text())["input_ids"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5 if options.student else 1e-2)
    distillation = DistillationLoss(student, teacher, tokenizer=tokenizer)
    for rows in ids[: len(ids) // 128 * 128].view(-1, 4, 32).to(device):
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
        loss = mean_loss(distillation, student, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
