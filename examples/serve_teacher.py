"""Serves any Megatron checkpoint as the teacher, with all Megatron arguments and the group --vcrd-*.

    torchrun --nproc-per-node 2 examples/serve_teacher.py --load checkpoint --use-checkpoint-args \\
        --pipeline-model-parallel-size 2 --vcrd-address host:port

A checkpoint in the format torch_dist loads with the tensor and pipeline parallelism of the arguments. A legacy
checkpoint (torch) needs the parallelism that it was saved with. With --vcrd-fill-cache FOLDER and the data arguments of
a training it serves no student, but writes its answers about all micro-batches of that training there (docs/cache.md).
Needs Python 3.12 and megatron-core 0.19. Without a GPU it runs on CPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.megatron_wheel import keep_compiled_helpers, require_training  # noqa: E402
from vcrd.megatron import cpu  # noqa: E402

require_training()
if not torch.cuda.is_available():
    cpu.enable()  # before anything of Megatron is imported

from megatron.core import mpu  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402
from megatron.training.checkpointing import (  # noqa: E402
    checkpoint_exists,
    load_args_from_checkpoint,
    load_checkpoint,
)
from megatron.training.global_vars import set_global_variables  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

import vcrd.megatron  # noqa: E402
from vcrd.megatron.arguments import add_vcrd_args, settings_from_args  # noqa: E402

# Megatron requires these arguments although a teacher does not need them.
DEFAULTS = {"micro_batch_size": 1, "tokenizer_type": "NullTokenizer"}


# EX_CONFIG of sysexits.h: examples/slurm/launch.sh does not restart the teacher after it.
WRONG_ARGUMENTS = 78


def refuse(sentence: str) -> NoReturn:
    print(f"{Path(__file__).name}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(WRONG_ARGUMENTS)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add_vcrd_args(parser)
    group = parser.add_argument_group("vcrd teacher")
    group.add_argument(
        "--vcrd-stay",
        action="store_true",
        help="serve one student job after another, until none has come for --vcrd-connect-timeout seconds",
    )
    group.add_argument(
        "--vcrd-fill-cache",
        metavar="FOLDER",
        help="serve no student: answer all micro-batches of the data arguments and --train-iters, and write the "
        "answers to this folder",
    )
    return parser


def tokenizer_of(args: argparse.Namespace) -> Any:
    """The tokenizer of the arguments, for comparison with the student's; None without its files."""
    try:
        return build_tokenizer(copy.copy(args))
    except Exception as error:  # from any library
        if args.rank == 0:
            sentence = f"the tokenizer {args.tokenizer_type} cannot be built: {error!r}"
            print(sentence, file=sys.stderr, flush=True)
        return None


def fill_cache(folder: str, model: Any, settings: vcrd.megatron.DistillSettings, **stated: Any) -> None:
    """Answers all micro-batches of the data arguments. Each data-parallel rank says what it has written."""
    from examples.pretrain_vcrd import datasets
    from examples.training_data import micro_batches_of, say

    filled = vcrd.megatron.fill_cache(
        model, micro_batches_of(datasets), folder, settings, report=say, **stated
    )
    if mpu.get_tensor_model_parallel_rank() == 0 and mpu.is_pipeline_first_stage():
        print(f"{folder}: data-parallel rank {mpu.get_data_parallel_rank()}: {filled}", flush=True)


def main() -> None:
    """Loads this rank's part of the teacher and serves it until every student has left."""
    keep_compiled_helpers()
    args = parse_args(extra_args_provider=add_arguments)
    # Otherwise Megatron would use random weights.
    if args.load is None or not checkpoint_exists(args.load):
        refuse(f"--load: expected the folder of a Megatron checkpoint, got {args.load}")
    # Not among the defaults, because Megatron uses defaults for arguments that are None, and these are False.
    args.exit_on_missing_checkpoint = args.no_load_optim = args.no_load_rng = True
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args)
    validate_args(args, DEFAULTS)
    # Requests contain tokens, so the files of the tokenizer are not necessary.
    set_global_variables(args, build_tokenizer=False)
    initialize_megatron()
    config_from_args = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
    config = config_from_args(args)
    builder = config.get_builder_cls()(config)
    model = builder.build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    try:
        iteration, _ = load_checkpoint(model, None, None, strict=True)
    except SystemExit:  # Megatron has printed the reason, and would exit with 0
        refuse(
            f"--load: expected a checkpoint in {args.load} that fits these arguments, got none; one in the legacy "
            "format (--ckpt-format torch) keeps the tensor and pipeline parallelism it was saved with"
        )
    stated = {"tokenizer": tokenizer_of(args), "checkpoint": f"{args.load}, iteration {iteration}"}
    if args.vcrd_fill_cache:
        fill_cache(args.vcrd_fill_cache, model, settings_from_args(args), **stated)
    else:
        served = vcrd.megatron.serve(model, settings_from_args(args), stay=args.vcrd_stay, **stated)
        if args.rank == 0:
            print(f"served {served} micro-batches", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
