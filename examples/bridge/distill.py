"""Distils a teacher into a Hugging Face checkpoint, by the training loop of Megatron-Bridge.

    torchrun --nproc-per-node 2 examples/bridge/distill.py --student-hf FOLDER --keep-layers 0,2,4-9 --data FOLDER \\
        --save RUN --teacher host:port --tp 2 train.train_iters=1000 optimizer.lr=1e-4

--teacher is the address where the student listens for a job of teacher.py, or cache:FOLDER, the answers of a teacher on
disk. With an address, --vcrd-teacher cache:FOLDER keeps the answers there. Or --teacher-hf names a Hugging Face
checkpoint that runs in the same processes. --data is a folder with training.jsonl, and perhaps validation.jsonl; each
line has `messages` for the chat template of the tokenizer. Only the assistant's tokens count.

Everything else that Bridge can configure follows as section.name=value. If RUN has checkpoints, training continues from
the last one. Without a GPU it runs on CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__mp_main__":
    from examples.checkpoint_writer import ignore_signals

    ignore_signals()

import argparse  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from examples.bridge import models  # noqa: E402
from examples.bridge.prune import parse_layers, prune  # noqa: E402
from vcrd.errors import expected  # noqa: E402


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the overrides of Bridge's configuration."""
    parser = models.parser_of(__doc__)
    parser.add_argument("--student-hf", required=True, help="folder or name of the student's checkpoint")
    parser.add_argument(
        "--keep-layers", metavar="LAYERS", help="make a shallower student of these layers: 0,2,4-9"
    )
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher",
        metavar="ADDRESS",
        help="of a teacher job, or cache:FOLDER; another name of --vcrd-address or --vcrd-teacher",
    )
    teacher.add_argument("--teacher-hf", help="a teacher in the same processes, with the same parallelism")
    parser.add_argument("--data", required=True, type=Path, help="folder with training.jsonl")
    parser.add_argument("--save", required=True, type=Path, help="folder for checkpoints and logs")
    parser.add_argument("--cp", type=int, default=1, help="context parallelism (default: %(default)s)")
    args, overrides = parser.parse_known_args()
    unknown = [word for word in overrides if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.save = args.save.absolute()
    if args.teacher:
        setting = "vcrd_teacher" if args.teacher.startswith("cache:") else "vcrd_address"
        setattr(args, setting, args.teacher)
    return args, overrides


def main() -> None:
    args, overrides = arguments()
    models.start()
    import torch

    try:
        if not (args.data / "training.jsonl").is_file():
            raise expected("--data", "a folder with training.jsonl", args.data)
        models.init_process_group()
        hf = student_of(args)
        bridge = models.bridge_of(hf)
        config = config_of(args, hf, models.provider_of(bridge, args), overrides)
        settings = models.settings_of(args, bridge.hf_pretrained.config)
        teacher = colocated(args, config.model) if args.teacher_hf else None
    except ValueError as error:
        models.refuse(error)
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from vcrd.megatron import distill

    plug = distill(forward_step, settings, teacher=teacher, tokenizer=models.tokenizer_of(hf))
    pretrain(config, plug)
    plug.close()
    torch.distributed.destroy_process_group()


def student_of(args: argparse.Namespace) -> str:
    """The student's Hugging Face checkpoint. With --keep-layers, rank 0 writes it to the folder of the run."""
    if args.keep_layers is None:
        return args.student_hf
    import torch.distributed as dist

    folder, error = args.save / "student-hf", None
    if dist.get_rank() == 0:
        try:
            prune(Path(args.student_hf), parse_layers(args.keep_layers), folder)
        except ValueError as raised:
            error = raised
    found = [error]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]
    return str(folder)


def config_of(args: argparse.Namespace, hf: str, provider: Any, overrides: list[str]) -> Any:
    """Bridge's configuration for this run. ValueError for an override that Bridge does not know."""
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
    from megatron.bridge.data.sft_processing import ChatSFTPreprocessingConfig
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

    provider.context_parallel_size = args.cp
    provider.calculate_per_token_loss = True  # each token of a step counts alike, whatever is masked
    # Megatron's distributed optimizer cannot resume with torch's Adam, which takes the place of Transformer Engine's.
    distributed = not models.ON_CPU
    # Pipeline stages expect one shape. A cache has answers to whole rows, so padding must not depend on others.
    fixed_length = args.pp > 1 or args.cp > 1 or args.vcrd_teacher is not None
    config = bridge.ConfigContainer(
        model=provider,
        train=bridge.TrainingConfig(
            train_iters=1000,
            global_batch_size=64,
            micro_batch_size=1,
            exit_signal_handler=True,
            exit_signal_handler_for_dataloader=True,  # Slurm signals every process
        ),
        validation=bridge.ValidationConfig(eval_interval=100, eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            min_lr=1e-5,
            adam_beta2=0.98,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
            bf16=args.dtype == "bfloat16",
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=0,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,  # a resumed run may have more iterations
        ),
        ddp=bridge.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
        ),
        dataset=GPTSFTDatasetConfig(
            dataset_root=str(args.data.absolute()),
            seq_length=args.seq_length,
            preprocessing=ChatSFTPreprocessingConfig(),
            dataset_kwargs={"pad_to_max_length": fixed_length},
            do_validation=(args.data / "validation.jsonl").is_file(),
            do_test=False,
            dataloader_type="cyclic",  # one iterator for the whole run, from which the plug may draw ahead
        ),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=str(args.save / "tensorboard")),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf),
        checkpoint=bridge.CheckpointConfig(
            save=str(args.save / "checkpoints"), load=str(args.save / "checkpoints"), save_interval=200
        ),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo" if models.ON_CPU else "nccl"),
        mixed_precision="bf16_mixed" if args.dtype == "bfloat16" else None,
    )
    try:
        return process_config_with_overrides(config, cli_overrides=overrides)
    except OverridesError as error:
        raise expected("section.name=value", "a setting of Bridge's ConfigContainer", error) from None


def colocated(args: argparse.Namespace, student: Any) -> Callable[[], list[Any]]:
    """For `distill(teacher=...)`: the teacher's chunks on this rank, built when Bridge has built the student's."""
    provider = models.provider_of(models.bridge_of(args.teacher_hf), args)
    for name in ("context_parallel_size", "sequence_parallel", "virtual_pipeline_model_parallel_size"):
        setattr(provider, name, getattr(student, name))
    if args.pp > 1:
        # The stages exchange the hidden states of both models. Megatron's default dispatcher of experts refuses this.
        student.variable_seq_lengths, student.moe_token_dispatcher_type = True, "alltoall"
    chunks: list[Any] = []

    def build(students: list[Any]) -> list[Any]:
        # Now and not in the first step, because loading is a collective, which the stages would enter one by one.
        provider.finalize()
        built = provider.provide_distributed_model(
            wrap_with_ddp=False,
            use_cpu_initialization=models.ON_CPU,
            pg_collection=students[0].pg_collection,
        )
        chunks.extend(chunk.eval().requires_grad_(False) for chunk in built)
        return students

    student.register_pre_wrap_hook(build)
    return lambda: chunks


if __name__ == "__main__":
    main()
