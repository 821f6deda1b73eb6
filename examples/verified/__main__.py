"""`python -m examples.verified`: a small student samples worked arithmetic, the verifier scores it, the student learns.

The student is a GRU, trained briefly on right solutions. The teacher knows the right tokens, and makes errors at some
places on purpose. Samples and scores go through a JSONL file, as from any sampler. It runs in one process on the CPU,
without Megatron. docs/validity.md describes the differences inside Megatron.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import vcrd
from examples.verified.arithmetic import (
    PADDING,
    SYMBOLS,
    Chain,
    correct_next,
    decode,
    encode,
    step_ids,
    verifier,
)
from examples.verified.dataset import Samples, write_samples

LENGTH = 48
OPERATIONS, LARGEST = 2, 3


class Student(nn.Module):
    def __init__(self, size: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SYMBOLS), size)
        self.layers = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(size, len(SYMBOLS))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] -> logits [b, s, vocab]."""
        return self.head(self.layers(self.embedding(tokens))[0])


def teacher_logits(tokens: Tensor, generator: torch.Generator, errs: float = 0.1) -> Tensor:
    """Logits [b, s, vocab]: high for the right tokens, and for a wrong token at a share `errs` of the places."""
    logits = torch.randn(*tokens.shape, len(SYMBOLS), generator=generator)
    for row, text in enumerate(map(decode, tokens.tolist())):
        prompt = text.find("?") + 1
        for position in range(max(prompt - 1, 0), len(text)):
            right = correct_next(text[:prompt], text[prompt : position + 1]) if prompt else ()
            for symbol in right:
                logits[row, position, SYMBOLS.index(symbol)] += 7.0
    wrong = torch.rand(tokens.shape, generator=generator) < errs
    other = torch.randint(1, len(SYMBOLS), tokens.shape, generator=generator)
    return logits.scatter_add(2, other[..., None], 12.0 * wrong[..., None])


def solution(chain: Chain, generator: torch.Generator) -> str:
    """A random right response."""
    text = ""
    while steps := chain.steps():
        step = list(steps)[int(torch.randint(len(steps), (), generator=generator))]
        text, chain = text + step, steps[step]
    return text + "."


def solved(count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, LENGTH + 1]: prompts, each with a right response."""
    rows = torch.full((count, LENGTH + 1), PADDING)
    for row in rows:
        chain = Chain.draw(generator, OPERATIONS, LARGEST)
        text = encode(chain.prompt + solution(chain, generator))
        row[: len(text)] = torch.tensor(text)
    return rows


@torch.no_grad()
def valid_share(student: Student, rows: Tensor) -> float:
    """Share of the prefixes of these right responses where the student's most probable token is right."""
    tokens, labels = rows[:, :-1], rows[:, 1:]
    spoken = (tokens == SYMBOLS.index("?")).cumsum(1).bool() & (labels != PADDING)
    judged, _ = verifier(tokens, *[student(tokens).argmax(-1).where(spoken, -1)] * 2)
    return float(judged[spoken].mean())


@torch.no_grad()
def respond(student: Student, prompt: str, generator: torch.Generator) -> list[int]:
    """The student's response up to its first wrong token. After it no correct continuation exists."""
    tokens = encode(prompt)
    while len(tokens) < LENGTH and correct_next(prompt, decode(tokens[len(prompt) :])):
        chances = student(torch.tensor([tokens]))[0, -1].softmax(-1)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return tokens[len(prompt) :]


@torch.no_grad()
def scored(student: Student, prompt: str, response: list[int], generator: torch.Generator) -> dict:
    """The line of one sample, with the validity of both proposals at each prefix."""
    tokens = torch.tensor([(encode(prompt) + response)[:-1]])
    teacher = teacher_logits(tokens, generator)
    judged = verifier(tokens, student(tokens).argmax(-1), teacher.argmax(-1))
    spoken = slice(len(prompt) - 1, None)
    return {
        "prompt": encode(prompt),
        "tokens": response,
        "steps": step_ids(decode(response)),
        "student_validity": judged[0][0, spoken].tolist(),
        "teacher_validity": judged[1][0, spoken].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.verified", description=__doc__)
    parser.add_argument("--samples", type=int, default=400, help="number of sampled responses")
    parser.add_argument("--warm-up", type=int, default=400, help="first training steps, on right solutions")
    parser.add_argument("--steps", type=int, default=100, help="steps of distillation")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the JSONL file; default: it is deleted")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # more threads do not help such a small model
    generator = torch.Generator().manual_seed(options.seed)
    student = Student()
    optimizer = torch.optim.AdamW(student.parameters(), 5e-3)
    for _ in range(options.warm_up):
        rows = solved(options.batch, generator)
        loss = cross_entropy(student(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PADDING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    held_out = solved(100, generator)
    print(f"before: right at {100 * valid_share(student, held_out):.1f} % of the held-out prefixes")

    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder, "samples.jsonl")
        prompts = [Chain.draw(generator, OPERATIONS, LARGEST).prompt for _ in range(options.samples)]
        lines = [scored(student, p, respond(student, p, generator), generator) for p in prompts]
        write_samples(path, lines)
        print(f"{len(lines)} samples, for example {decode(lines[0]['prompt'])}{decode(lines[0]['tokens'])}")
        data = Samples(
            path, LENGTH, padding=PADDING, samples=options.steps * options.batch, seed=options.seed
        )
        for step, batch in enumerate(DataLoader(data, options.batch)):
            rows = torch.arange(len(batch["tokens"]))[:, None]
            ids = batch["vcrd_steps"]
            out = vcrd.validity_calibrated_kl(
                student(batch["tokens"]),
                teacher_logits(batch["tokens"], generator),
                batch["labels"],
                mask=batch["loss_mask"],
                validity="scores",
                # Each sample has its own steps.
                steps=torch.where(ids >= 0, ids + LENGTH * rows, -1),
                student_validity=batch["vcrd_student_validity"].clamp(min=0.05),
                teacher_validity=batch["vcrd_teacher_validity"].clamp(min=0.05),
            )
            kept = batch["loss_mask"] > 0
            loss = out.loss.sum() / kept.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 or step == options.steps - 1:
                weight = float(out.weight[kept].mean())
                print(f"step {step:3d}: loss {loss.item():.3f}, mean weight {weight:.3f}")
    print(f"after:  right at {100 * valid_share(student, held_out):.1f} % of the held-out prefixes")


if __name__ == "__main__":
    main()
