"""Pretraining with distillation on megatron.training, with all Megatron arguments and the group --vcrd-*.

    torchrun --nproc-per-node 4 examples/pretrain_vcrd.py <Megatron's arguments> --vcrd-address host:port

Needs Python 3.12 and megatron-core 0.19. Without a GPU it runs on CPU and gloo. The teacher is a job of
examples/serve_teacher.py, or runs in the same processes with --vcrd-local-teacher CHECKPOINT. With --vcrd-fill-cache
FOLDER it does not train: it asks the teacher about all micro-batches of the training and writes the answers there.
"""

from __future__ import annotations

if __name__ == "__mp_main__":
    from examples.checkpoint_writer import ignore_signals

    ignore_signals()

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.megatron_wheel import keep_compiled_helpers, require_training  # noqa: E402
from vcrd.megatron import cpu  # noqa: E402

require_training()
if not torch.cuda.is_available():
    cpu.enable()  # before anything of Megatron is imported

from megatron.core import mpu  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank  # noqa: E402
from megatron.core.utils import (  # noqa: E402
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.utils import (  # noqa: E402
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

import vcrd.megatron  # noqa: E402
from examples.local_teacher import local_teacher  # noqa: E402
from examples.training_data import fill_by_link  # noqa: E402
from examples.verified.dataset import provider  # noqa: E402
from vcrd.megatron.arguments import add_vcrd_args, settings_from_args  # noqa: E402

BATCH = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
PACKING = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def batch_of(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next micro-batch: tensors [b, s], None where the pipeline stage needs none."""
    args = get_args()
    is_packed = args.sft or args.dataloader_inter_document_masking
    has_extra_heads = extra_heads_here(vp_stage)
    ends = is_first_or_last_pipeline_stage(vp_stage) or has_extra_heads
    if not ends and not is_packed:
        return dict.fromkeys((*BATCH, *PACKING))
    batch = {}
    tensor_rank = mpu.get_tensor_model_parallel_rank()
    if tensor_rank == 0:
        drawn = next(data_iterator)
        for name in (*BATCH, *PACKING):
            batch[name] = None if drawn.get(name) is None else drawn[name].cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=is_packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tensor_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_extra_heads,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not ends:
        return {**dict.fromkeys((*BATCH, *PACKING)), **batch}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=mpu.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def extra_heads_here(vp_stage: int | None) -> bool:
    """Whether this rank has heads of multi-token prediction. Their stage needs tokens and labels."""
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def packing_of(batch: dict[str, Any]) -> PackedSeqParams | None:
    """The parameters of attention for sequences that are packed into one row."""
    if batch["cu_seqlens"] is None:
        return None
    real = batch["cu_seqlens"].squeeze(0)
    padded = None if batch["cu_seqlens_padded"] is None else batch["cu_seqlens_padded"].squeeze(0)
    edges = real if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    size = batch["local_cp_size"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if size is None else int(size.item()),
        cp_group=batch["hybrid_cp_group"],
    )


def loss_of(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """losses [b, s] per token. Returns their masked sum, the number of tokens, and both for the log."""
    args = get_args()
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    if args.check_for_nan_in_loss_and_grad:
        for found, word in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=total,
                rejection_func=found,
                message=f"found {word} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    tokens = mask.sum().detach().int()
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(data_iterator: Any, model: torch.nn.Module, return_schedule_plan: bool = False) -> tuple:
    """One micro-batch through this rank's part of the model."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = batch_of(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packing_of(batch),
    )
    return output, partial(loss_of, batch["loss_mask"])


def datasets(samples: list[int], vp_stage: int | None = None) -> tuple:
    """Datasets for training, validation and test, from Megatron's arguments."""
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    if args.sft:
        from megatron.training.datasets.sft_dataset import SFTDataset

        kind = SFTDataset

    def needed(stage: int | None = vp_stage) -> bool:
        on_stage = args.sft or is_first_or_last_pipeline_stage(stage) or extra_heads_here(stage)
        return mpu.get_tensor_model_parallel_rank() == 0 and on_stage

    return BlendedMegatronDatasetBuilder(kind, samples, needed, dataset_config(args)).build()


datasets.is_distributed = True  # each rank builds the part that it needs


def dataset_config(args: Any) -> GPTDatasetConfig:
    """The configuration of the datasets. Most fields are arguments with the same name."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    same = {
        f.name: getattr(args, f.name) for f in fields(GPTDatasetConfig) if f.init and hasattr(args, f.name)
    }
    renamed = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "tokenizer": build_tokenizer(args),
        "path_to_cache": args.data_cache_path,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "inter_document_masking": args.dataloader_inter_document_masking,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
    }
    return GPTDatasetConfig(**{**same, **renamed})


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the settings of vcrd and the options of this script."""
    group = add_vcrd_args(parser).add_argument_group("vcrd, in this script")
    group.add_argument(
        "--vcrd-local-teacher",
        metavar="CHECKPOINT",
        help="folder of a teacher (torch_dist) that runs in the student's own processes, with their parallelism; "
        "its architecture comes from there too",
    )
    group.add_argument(
        "--vcrd-samples",
        metavar="JSONL",
        help="samples with steps and scores to train on, as examples/verified/dataset.py describes them",
    )
    group.add_argument(
        "--vcrd-fill-cache",
        metavar="FOLDER",
        help="do not train: ask the teacher at --vcrd-address about all micro-batches of the training, and write its "
        "answers to this folder (docs/cache.md)",
    )
    return parser


def main() -> None:
    """Parses, builds, trains."""
    keep_compiled_helpers()
    args = parse_and_validate_args(
        extra_args_provider=add_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    config_from_args = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
    config, settings, teacher, data = config_from_args(args), settings_from_args(args), None, datasets
    if args.vcrd_local_teacher:
        teacher = local_teacher(args, config, args.vcrd_local_teacher)
    if args.vcrd_samples:
        scores = settings.validity == "scores"
        data = provider(args.vcrd_samples, steps=None, scores=scores, vocab_size=settings.vocab_size)
    if args.vcrd_fill_cache:
        initialize_megatron()
        # The teacher compares the vocabulary, and no model says here what it is.
        vocab_size = settings.vocab_size or args.padded_vocab_size
        fill_by_link(args.vcrd_fill_cache, data, settings.replaced(vocab_size=vocab_size))
        torch.distributed.destroy_process_group()
        return
    plug = vcrd.megatron.distill(forward_step, settings, teacher=teacher)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        data,
        ModelType.encoder_or_decoder,
        plug,
    )
    plug.close()


if __name__ == "__main__":
    main()
