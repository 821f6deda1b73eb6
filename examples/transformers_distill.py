"""The loss in a plain Hugging Face loop on one device, without Megatron.

    python examples/transformers_distill.py [--student NAME --teacher NAME --text FILE]

NAME is the name or folder of a causal language model; both models need the same tokenizer. Without options it uses tiny
random models and tokens. In a Trainer of transformers or TRL, return `distillation_loss` from an overridden
`compute_loss`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import vcrd


def distillation_loss(student, teacher, batch):
    """The mean loss over all predicted tokens. batch: input_ids and attention_mask [b, s]."""
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits[:, :-1]
    student_logits = student(**batch).logits[:, :-1]
    labels, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    true_size = min(
        student_logits.shape[-1], teacher_logits.shape[-1]
    )  # the padding of the vocabulary may differ
    out = vcrd.validity_calibrated_kl(student_logits, teacher_logits, labels, mask=mask, vocab_size=true_size)
    return out.loss.sum() / mask.sum()


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
    student, teacher = load(options.student, 32).to(device), load(options.teacher, 64).to(device).eval()
    ids = torch.randint(128, (30 * 4 * 32,))
    if options.text:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        ids = torch.tensor(tokenizer(Path(options.text).read_text())["input_ids"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5 if options.student else 1e-2)
    for rows in ids[: len(ids) // 128 * 128].view(-1, 4, 32).to(device):
        loss = distillation_loss(
            student, teacher, {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
