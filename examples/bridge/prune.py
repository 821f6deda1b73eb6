"""Depth pruning of a Hugging Face checkpoint: the layers that are kept, renumbered, in a folder of their own.

Each weight is copied bit for bit, embeddings stay tied or untied, and the configuration has the new number of layers.
One file of weights at a time is in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from vcrd.errors import expected

from .models import read_json

# Their layers are all alike apart from `layer_types`. Others have layers of several kinds, which the configuration
# names by number.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_INDEX, _RECORD = "model.safetensors.index.json", "kept_layers.json"
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..*)$")


def parse_layers(text: str) -> list[int]:
    """`0,2,4-6` -> [0, 2, 4, 5, 6]. ValueError for another text, or unless the numbers rise."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or dash and not last.isdigit():
            raise expected("--keep-layers", "numbers and ranges, such as 0,2,4-6", repr(text))
        layers += range(int(first), int(last if dash else first) + 1)
    if not layers or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise expected("--keep-layers", "rising numbers of layers", repr(text))
    return layers


def prune(source: Path, kept: list[int], target: Path) -> None:
    """Writes the checkpoint `target` with these layers of `source`, and the other files as they are.

    Leaves a `target` alone that already has these layers. ValueError if it holds something else, or if `source` cannot
    be pruned.
    """
    if target.exists():
        record = target / _RECORD
        had = read_json(record) if record.exists() else None
        if had != kept:
            raise expected("--keep-layers", f"those of {target} or another --save", f"{kept}, not {had}")
        return
    config = _pruned_config(source, kept)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise expected("--student-hf", "a folder with weights in safetensors", source)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written to another folder and renamed, so that a killed run leaves no half of a checkpoint.
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        _copy_other_files(source, folder)
        _write_weights(files, kept, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / _RECORD).write_text(json.dumps(kept) + "\n")
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pruned_config(source: Path, kept: list[int]) -> dict:
    if not source.is_dir():
        raise expected("--student-hf", "a folder (`hf download` makes one) with --keep-layers", source)
    config = read_json(source / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        what = f"a model of a type whose layers are alike ({', '.join(MODEL_TYPES)})"
        raise expected("--keep-layers", what, config.get("model_type"))
    layers = config["num_hidden_layers"]
    if kept[-1] >= layers:
        raise expected("--keep-layers", f"numbers below the {layers} layers of {source}", kept[-1])
    if config.get("use_sliding_window") and "layer_types" not in config:
        # Without a list, the first max_window_layers have full attention.
        raise expected(
            "--keep-layers", "layer_types in the configuration of a model with sliding windows", None
        )
    for name, value in config.items():
        if isinstance(value, list) and len(value) == layers and name == "layer_types":
            config[name] = [value[layer] for layer in kept]
    return {**config, "num_hidden_layers": len(kept)}


def _write_weights(files: list[Path], kept: list[int], folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    renumbered = {layer: number for number, layer in enumerate(kept)}
    places: dict[str, str] = {}
    size = 0
    for file in files:
        state = {}
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                found = _LAYER.match(name)
                if found and int(found[2]) not in renumbered:
                    continue
                new = f"{found[1]}{renumbered[int(found[2])]}{found[3]}" if found else name
                state[new] = weights.get_tensor(name)
        if state:
            save_file(state, folder / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(state, file.name)
        size += sum(tensor.nbytes for tensor in state.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_other_files(source: Path, folder: Path) -> None:
    """The tokenizer, its chat template, the generation's defaults: all files except weights and configuration."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    for path in source.iterdir():
        if (
            path.is_file()
            and path.suffix not in weights
            and path.name not in (_INDEX, "config.json", _RECORD)
        ):
            shutil.copyfile(path, folder / path.name)
