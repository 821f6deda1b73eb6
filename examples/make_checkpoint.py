"""Saves a Megatron model with random weights as a checkpoint, as a teacher for tests.

    torchrun --standalone examples/make_checkpoint.py <Megatron's arguments of a model> --save FOLDER

Runs in one process, without data or training. The model of the arguments, with the initial weights of --seed, becomes
iteration 1. A teacher with any parallelism can load it. Needs Python 3.12 and megatron-core 0.19. Without a GPU it runs
on CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.megatron_wheel import keep_compiled_helpers, require_training  # noqa: E402
from vcrd.megatron import cpu  # noqa: E402

require_training()
if not torch.cuda.is_available():
    cpu.enable()  # before anything of Megatron is imported

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.checkpointing import save_checkpoint  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402


def main() -> None:
    keep_compiled_helpers()
    args = parse_and_validate_args(args_defaults={"no_save_optim": True, "no_save_rng": True})
    if args.save is None:
        raise SystemExit("--save: expected the folder of the checkpoint, got none")
    initialize_megatron()
    config = gpt_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
    save_checkpoint(1, model, None, None, 0)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
