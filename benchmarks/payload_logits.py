"""Real logits: SmolLM2-135M-Instruct on two kinds of text, and four students made from it, from near to far.

Needs the packages of the demo, and its cache of problems and tokenizer, which the first run writes.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

LONGEST = 512  # tokens of one sequence

# Layers are left out at even distances. The farthest student is that of the demo, before any training.
LEFT_OUT = (7, 10, 13, 16, 22, 25)


def logits(positions: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """For each text its name, the teacher's logits, and the logits by student, float32 [positions, vocabulary]."""
    from examples.demo.settings import CACHE
    from examples.demo.source import hugging_face_model, prepare

    prepare(CACHE)
    model = hugging_face_model().requires_grad_(False)
    for name, sequences in (("CHAMP", champ(CACHE)), ("heapq", source(CACHE))):
        text = cut(sequences, positions)
        # One text after the other, because 2048 positions of five models take 2 GB.
        yield name, run(model, text), {student: run(model, text) for student in made_of(model)}


def champ(cache: Path) -> Iterator[list[int]]:
    """One problem in five with its human-written solution, in the chat template."""
    from examples.demo.source import problems

    return (problem.tokens[:LONGEST] for problem in problems(cache)[::5])


def source(cache: Path) -> Iterator[list[int]]:
    """The source of Python's heapq: half code, half English."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(cache / "tokenizer.json")).encode(inspect.getsource(heapq)).ids
    return (tokens[start : start + LONGEST] for start in range(0, len(tokens), LONGEST))


def cut(sequences: Iterator[list[int]], positions: int) -> list[list[int]]:
    """The first sequences with `positions` tokens in total; the last one is shortened."""
    taken: list[list[int]] = []
    left = positions
    for sequence in sequences:
        taken.append(sequence[:left])
        left -= len(taken[-1])
        if not left:
            return taken
    raise ValueError(f"positions: expected at most {positions - left}, which the text has, got {positions}")


def run(model: torch.nn.Module, sequences: list[list[int]]) -> Tensor:
    return torch.cat([model(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in sequences])


def made_of(model: torch.nn.Module) -> Iterator[str]:
    """Changes the model into one student after the other, and yields their names."""
    from examples.demo.settings import KEPT_LAYERS

    layers = model.model.layers
    for name, kept in (
        (f"{len(KEPT_LAYERS)} of {len(layers)} layers", KEPT_LAYERS),
        (f"{len(layers) - len(LEFT_OUT)} of {len(layers)} layers", set(range(len(layers))) - set(LEFT_OUT)),
    ):
        model.model.layers = torch.nn.ModuleList([layers[index] for index in sorted(kept)])
        yield name
    model.model.layers = layers
    whole = {name: weight.clone() for name, weight in layers.state_dict().items()}
    for name, rounded in (("4-bit weights", to_4_bits), ("e4m3 weights", to_e4m3)):
        state = {key: rounded(weight) if weight.dim() == 2 else weight for key, weight in whole.items()}
        layers.load_state_dict(state)
        yield name
    layers.load_state_dict(whole)


def to_4_bits(weight: Tensor) -> Tensor:
    return scaled(weight, 7, torch.round)


def to_e4m3(weight: Tensor) -> Tensor:
    return scaled(weight, 448, lambda w: w.to(torch.float8_e4m3fn).float())


def scaled(weight: Tensor, most: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounded with one scale per output row."""
    scale = weight.abs().amax(1, keepdim=True) / most
    return rounded(weight / scale) * scale
