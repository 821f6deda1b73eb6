"""What the scripts of this folder share: Hugging Face checkpoints as Megatron models, by AutoBridge.

Importing it imports neither Megatron nor Bridge. The processes that Megatron spawns to write checkpoints import the
main script again, and need neither.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from vcrd.errors import expected
from vcrd.megatron import cpu
from vcrd.megatron.arguments import add_vcrd_args, settings_from_args

if TYPE_CHECKING:
    from vcrd.megatron import DistillSettings

ON_CPU = not torch.cuda.is_available()
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# EX_CONFIG of sysexits.h: examples/slurm/launch.sh does not restart a teacher after it.
WRONG_ARGUMENTS = 78
# These need Transformer Engine, apex or a GPU.
_FUSIONS = (
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
)


def start() -> None:
    """Without a GPU, opens the CPU mode. To be called before anything of Megatron is imported."""
    if ON_CPU:
        cpu.enable()


def refuse(error: object) -> NoReturn:
    """Ends the process because of wrong arguments."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
    sys.exit(WRONG_ARGUMENTS)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that the teacher's and the student's script share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor parallelism (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages (default: %(default)s)")
    parser.add_argument(
        "--seq-length",
        type=int,
        default=2048,
        help="longest sequence, equal in both jobs (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32" if ON_CPU else "bfloat16",
        help="of the weights (default: %(default)s; without a GPU float32)",
    )
    return add_vcrd_args(parser)


def settings_of(args: argparse.Namespace, config: Any) -> DistillSettings:
    """The settings of the arguments. The true vocabulary is that of the Hugging Face `config` unless they name one."""
    settings = settings_from_args(args)
    return settings if settings.vocab_size is not None else settings.replaced(vocab_size=config.vocab_size)


def bridge_of(hf: str) -> Any:
    """The AutoBridge of a Hugging Face checkpoint. ValueError if there is none, or Bridge cannot convert it."""
    from megatron.bridge import AutoBridge

    try:
        return AutoBridge.from_hf_pretrained(hf)
    except Exception as error:  # from Bridge, transformers or the hub
        raise expected("Hugging Face checkpoint", "one that Bridge converts", f"{hf}: {error}") from None


def provider_of(bridge: Any, args: argparse.Namespace) -> Any:
    """Bridge's model provider, which loads the weights when it builds the model. ValueError for wrong arguments."""
    config, dtype = bridge.hf_pretrained.config, DTYPES[args.dtype]
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and args.seq_length > longest:
        raise expected("--seq-length", f"at most {longest}, the longest of the model", args.seq_length)
    if config.num_hidden_layers % args.pp:
        raise expected("--pp", f"a divisor of the {config.num_hidden_layers} layers", args.pp)
    if config.num_attention_heads % args.tp:
        raise expected("--tp", f"a divisor of the {config.num_attention_heads} attention heads", args.tp)
    provider = bridge.to_megatron_provider()
    values: dict[str, Any] = {
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "pipeline_dtype": dtype,
        "seq_length": args.seq_length,
        # Bridge pads no vocabulary whose size it is given.
        "vocab_size": -(-config.vocab_size // args.tp) * args.tp,
    }
    for name, value in {**values, **cpu_values()}.items():
        setattr(provider, name, value)
    provider.params_dtype = dtype
    provider.bf16, provider.fp16 = dtype is torch.bfloat16, False
    return provider


def cpu_values() -> dict[str, Any]:
    """What a provider needs in the CPU mode, besides a dtype; nothing with a GPU."""
    if not ON_CPU:
        return {}
    from megatron.bridge.models.gpt_provider import local_layer_spec

    layers = {"transformer_layer_spec": local_layer_spec, "use_cpu_initialization": True}
    return {**layers, **dict.fromkeys(_FUSIONS, False)}


def tokenizer_of(hf: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf)


def init_process_group() -> None:
    """The process group of torchrun's variables, or of examples/slurm/rank.sh."""
    if not ON_CPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl")


def read_json(path: Path) -> Any:
    """ValueError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise expected(path.name, "a file of JSON", f"{path}: {error}") from None
