"""Settings of Megatron that do not work with distillation, or not for a teacher: each is one error message."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from vcrd.errors import expected
from vcrd.megatron.hooks import takes_output_processor
from vcrd.megatron.layout import Groups


def check_compatibility(chunk: torch.nn.Module, args: Any = None, remote: bool = True) -> None:
    """ValueError that names the argument, if a setting of the model or the job does not work with the plug.

    chunk: the unwrapped model. args: the job's settings by Megatron's names, as of `TrainingLoop`; None if not known.
    remote: whether the teacher runs in another job. One in the same ranks is given the student's positions and mask.

    No collectives. These do work: cross_entropy_loss_fusion, which evaluation and the heads of multi-token prediction
    go on using for their own logits; tp_comm_overlap, which does not touch the output layer; CUDA graphs of layers.
    """
    config = chunk.config
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        _refuse_unusual_plans(chunk, remote)
    if getattr(config, "hybrid_context_parallel", False):
        _refuse(
            "hybrid_context_parallel",
            "False",
            "True",
            "each sample may be cut over other ranks, and the teacher's answer is cut one way",
        )
    # The graph of a whole iteration is a scope up to 0.16, and an implementation later.
    scopes = getattr(config, "cuda_graph_scope", None) or ()
    scopes = [scopes] if isinstance(scopes, str) or not hasattr(scopes, "__iter__") else scopes
    whole = [getattr(scope, "name", scope) for scope in scopes].count("full_iteration")
    if whole or getattr(config, "cuda_graph_impl", None) == "full_iteration":
        _refuse(
            "cuda_graph_impl",
            "graphs of layers at most",
            "full_iteration",
            "a graph cannot wait for the teacher",
        )
    parallel = getattr(chunk, "parallel_output", True)
    if not parallel and getattr(config, "tensor_model_parallel_size", 1) > 1:
        _refuse(
            "parallel_output", "True", "False", "each tensor rank must have its own columns of the logits"
        )
    if getattr(args, "inprocess_restart", False):
        _refuse(
            "inprocess_restart",
            "False",
            "True",
            "the plug holds the model of the process's first life; let the launcher restart the process",
        )
    _refuse_other_losses(chunk, args)
    if remote:
        _refuse_half_resets(args)
        _refuse_other_splits(config, args)


def _refuse_unusual_plans(chunk: torch.nn.Module, remote: bool) -> None:
    """The overlapped schedule carries a plan out, layer by layer, after the forward step has returned."""
    if remote and takes_output_processor(chunk):
        return
    _refuse(
        "overlap_moe_expert_parallel_comm",
        "False unless the teacher runs in another job and the model is Megatron-Core 0.19's GPTModel",
        "True",
        (
            "its schedule never calls the student's forward, in which a teacher in the same ranks would run"
            if takes_output_processor(chunk)
            else "its schedule takes a loss by the argument output_processor alone, and this model has none"
        ),
    )


def _refuse_other_losses(chunk: torch.nn.Module, args: Any) -> None:
    if any(kind.__name__ == "DistillationModel" for kind in type(chunk).__mro__):
        raise expected(
            "model", "one without ModelOpt's distillation, which has another loss", type(chunk).__name__
        )
    if getattr(args, "logits_load_dir", None) is not None:
        _refuse(
            "logits_load_dir", "None", repr(args.logits_load_dir), "cached logits bring a loss of their own"
        )
    if getattr(args, "export_kd_teacher_load", None):
        _refuse(
            "export_kd_teacher_load",
            "None",
            repr(args.export_kd_teacher_load),
            "ModelOpt's distillation has another loss",
        )


def _refuse_half_resets(args: Any) -> None:
    """Documents in one sample that only positions or masks of the dataset keep apart: the teacher is not told them."""
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(args, name, False):
            _refuse(
                name,
                "False",
                "True",
                "the teacher would look across the documents; dataloader_inter_document_masking tells it their edges",
            )


def _refuse_other_splits(config: Any, args: Any) -> None:
    """Context parallelism that does not cut each packed sequence by itself in the zig-zag order."""
    size = getattr(config, "context_parallel_size", 1)
    if size == 1:
        return
    reason = "the teacher's answer is cut by packed sequences, each of them in the zig-zag order"
    if (mode := getattr(config, "cp_partition_mode", "zigzag")) not in (None, "zigzag"):
        _refuse("cp_partition_mode", "'zigzag'", repr(mode), reason)
    if getattr(args, "dataloader_inter_document_masking", False) and not getattr(args, "sft", False):
        _refuse(
            "dataloader_inter_document_masking", f"False with context_parallel_size {size}", "True", reason
        )


def _refuse(name: str, allowed: str, got: str, reason: str) -> None:
    raise expected(name, allowed, f"{got}; vcrd does not work with it, because {reason}")


def refuse_delayed_scaling(config: Any) -> None:
    """ValueError for a teacher's configuration with the FP8 recipe "delayed".

    Transformer Engine (2.20.0.dev0, `FP8GlobalStateManager.autocast_exit`) updates the scales of delayed scaling at the
    end of a forward that records a graph, and in backward. A teacher has neither. In a teacher job its scales would
    keep the checkpoint's values, which are 1 if it was trained in bfloat16. In the student's ranks the student's
    forward would update them, and they would not be saved, so that a resumed run would have other losses.
    """
    # In 0.16 and later: a string, or an enumeration that is a string.
    if getattr(config, "fp8", None) and getattr(config, "fp8_recipe", None) == "delayed":
        raise expected(
            "fp8_recipe",
            "'tensorwise', 'blockwise' or 'mxfp8' for a teacher",
            "'delayed', whose scales are updated in training only",
        )


def refuse_dependent_replicas(chunk: torch.nn.Module, groups: Groups) -> None:
    """ValueError, on every rank alike, for a teacher whose replicas cannot answer each for itself.

    Replicas answer different requests at different times, and one of them may have none. Experts that are shared among
    replicas would wait for all of them in every layer.
    """
    if groups.context.size() > 1:
        what = "1 for a teacher, each replica of which answers whole sequences"
        raise expected("context_parallel_size", what, groups.context.size())
    if getattr(chunk.config, "expert_model_parallel_size", 1) == 1:
        return
    experts = getattr(getattr(chunk, "pg_collection", None), "ep", None)
    experts = experts or parallel_state.get_expert_model_parallel_group()
    if not set(dist.get_process_group_ranks(groups.model)).issuperset(dist.get_process_group_ranks(experts)):
        what = "one within the tensor and pipeline ranks of a teacher, each replica of which answers alone"
        raise expected("expert_model_parallel_size", what, experts.size())


def refuse_uneven_tokens(config: Any, batch: int, sequence: int) -> None:
    """ValueError, before any collective, for tokens [batch, sequence] that a teacher's FP8 layers cannot multiply.

    A product in FP8 takes multiples of 8 rows on each rank, and of a block of 32 with MXFP8 (Transformer Engine
    2.20.0.dev0, `assert_dim_for_fp8_exec` and its MXFP8 quantizer).
    """
    if not getattr(config, "fp8", None):
        return
    multiple = 32 if getattr(config, "fp8_recipe", None) == "mxfp8" else 8
    parts = config.tensor_model_parallel_size if getattr(config, "sequence_parallel", False) else 1
    if batch * sequence % (multiple * parts):
        raise expected(
            "tokens",
            (
                f"micro-batches of a multiple of {multiple * parts} tokens, because the teacher's layers multiply "
                f"in FP8 (recipe {config.fp8_recipe!s})"
            ),
            f"[{batch}, {sequence}]",
        )
