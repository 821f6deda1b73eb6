"""Writes a Megatron checkpoint of distill.py as a Hugging Face folder, which `transformers` loads.

    python examples/bridge/export.py --checkpoint RUN/checkpoints --out FOLDER

The configuration and the tokenizer are those of the student's Hugging Face checkpoint. The Megatron checkpoint says
where that is. One process without a GPU exports a checkpoint of any parallelism.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.bridge import models  # noqa: E402
from vcrd.errors import expected  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, help="folder of the checkpoints, such as RUN/checkpoints"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--hf", help="the student's Hugging Face checkpoint, if it has moved")
    parser.add_argument(
        "--dtype", choices=models.DTYPES, help="of the written weights; default: of the checkpoint"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="load the folder with transformers and compare its logits with Megatron's",
    )
    args = parser.parse_args()
    models.start()
    try:
        difference = export(args.checkpoint, args.out, args.hf, args.dtype, args.check)
    except ValueError as error:
        models.refuse(error)
    print(f"wrote {args.out}", flush=True)
    if args.check:
        print(f"largest difference of a logit from Megatron's: {difference:.3g}", flush=True)


def export(
    checkpoint: str, out: Path, hf: str | None = None, dtype: str | None = None, check: bool = False
) -> float | None:
    """Writes `out`. With `check`, returns the largest difference of a logit between Megatron and transformers."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    if not Path(checkpoint).is_dir():
        raise expected("--checkpoint", "the folder of a Megatron checkpoint", checkpoint)
    hf = hf or AutoBridge.get_hf_model_id_from_checkpoint(checkpoint)
    if hf is None:
        raise expected("--hf", "one, because the Megatron checkpoint names none", None)
    bridge = models.bridge_of(hf)
    with temporary_distributed_context(backend="gloo"):
        # Rows of padding end here: Bridge would write them too. The overrides reach any field of the provider.
        values = {"vocab_size": bridge.hf_pretrained.config.vocab_size, **models.cpu_values()}
        chunks = bridge.load_megatron_model(checkpoint, mp_overrides=values, wrap_with_ddp=False)
        weights = models.DTYPES[dtype] if dtype else next(chunks[0].parameters()).dtype
        # transformers loads the weights in the dtype of the configuration.
        bridge.hf_pretrained.config.dtype = weights
        bridge.save_hf_pretrained(chunks, out, show_progress=False, strict=True, weight_dtype=weights)
        return logit_difference(chunks[0], out) if check else None


@torch.no_grad()
def logit_difference(chunk: Any, folder: Path, length: int = 64) -> float:
    """The largest difference between the logits of a whole Megatron model and of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    vocabulary = exported.config.vocab_size
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    logits = chunk.eval()(tokens, torch.arange(length).expand_as(tokens), None)[..., :vocabulary]
    return (logits - exported(tokens).logits).abs().max().item()


if __name__ == "__main__":
    main()
