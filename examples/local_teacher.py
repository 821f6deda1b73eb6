"""A frozen teacher in the student's own ranks, with the architecture and the weights of a distributed checkpoint."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

# Megatron takes these from the arguments of a checkpoint only if they are None; some stay if they are None there.
_ARCHITECTURE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels num_query_groups padded_vocab_size spec "
    "max_position_embeddings hybrid_layer_pattern mtp_num_layers mtp_hybrid_override_pattern "
    "num_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_latent_size "
    "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json"
).split()
# How the student's own layers are divided among the stages.
_SPREAD = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


def local_teacher(
    args: argparse.Namespace, student: Any, checkpoint: str
) -> Callable[[], list[torch.nn.Module]]:
    """For `distill(teacher=...)`: returns the teacher's chunks on this rank, built and loaded beside the student's.

    The teacher has the parallelism of the student, whatever the checkpoint was saved with. It also has all arguments of
    the student that Megatron's --use-checkpoint-args does not take from a checkpoint. args: validated arguments of the
    student. student: its model configuration for `pretrain`; this function changes it. checkpoint: a folder in the
    format torch_dist. ValueError for another format, or if the vocabulary does not fit.
    """
    theirs = copy.copy(args)
    for name in (*_ARCHITECTURE, *_SPREAD, "ckpt_step"):
        setattr(theirs, name, None)
    theirs.load = checkpoint
    if not checkpointing.checkpoint_exists(checkpoint):
        raise ValueError(
            f"--vcrd-local-teacher: expected the folder of a Megatron checkpoint, got {checkpoint}"
        )
    path = checkpointing.get_load_checkpoint_path_by_args(theirs)
    if not dist_checkpointing.check_is_distributed_checkpoint(path):
        raise ValueError(f"--vcrd-local-teacher: expected the format torch_dist, got another one in {path}")
    checkpointing.load_args_from_checkpoint(theirs)
    true, padded = args.vcrd_vocab_size, theirs.padded_vocab_size
    if padded < (true or padded) or (true is None and padded != args.padded_vocab_size):
        raise ValueError(
            "--vcrd-vocab-size: expected the true vocabulary of both, for the teacher's checkpoint has "
            f"{padded} columns and the student {args.padded_vocab_size}, got {true}"
        )
    # A distributed checkpoint is split again for each layout, so the vocabulary shards are those of the student.
    theirs.padded_vocab_size = args.padded_vocab_size
    if theirs.num_experts is None:
        theirs.expert_model_parallel_size = 1
    # Keeps the random state the same as without a teacher, also in a resumed run.
    theirs.perform_initialization = False
    chunks: list[torch.nn.Module] = []

    def build(students: list[torch.nn.Module]) -> list[torch.nn.Module]:
        chunks[:] = _load(theirs, path)
        return students

    # Now and not in the first training step: loading is a collective, and the stages reach that step one by one.
    student.post_wrap_hooks.append(build)
    # The stages exchange the hidden states of both models. Megatron has no argument for this.
    student.transformer.variable_seq_lengths = True
    return lambda: chunks


def _load(args: argparse.Namespace, path: str) -> list[torch.nn.Module]:
    config_of = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
    config: Any = config_of(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
    state = {f"model{n}": chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}
    state = dist_checkpointing.load(state, path)
    for n, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{n}"])
        chunk.eval().requires_grad_(False)
    return chunks
