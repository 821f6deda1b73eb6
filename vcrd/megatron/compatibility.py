"""Megatron's settings that do not go together with distillation, refused with a sentence when the plug attaches."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from vcrd.settings import DistillSettings


def check_compatibility(
    chunk: torch.nn.Module, settings: DistillSettings, args: Any = None, linked: bool = True
) -> None:
    """ValueError that names the argument, where the model's or the job's settings clash with the plug. No collectives.

    chunk: the unwrapped last stage. args: Megatron's arguments (default: those of megatron.training, where it runs).
    linked: whether the teacher runs elsewhere; one in the same ranks is given the student's own positions and mask.

    Not clashes: cross_entropy_loss_fusion, which evaluation and the heads of multi-token prediction go on using on
    logits of their own; tp_comm_overlap, which leaves the output layer alone; CUDA graphs of layers.
    """
    config = chunk.config
    args = _megatron_args() if args is None else args
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        _refuse(
            "overlap_moe_expert_parallel_comm", "False", "True", "its schedule never calls the model's loss"
        )
    if getattr(config, "hybrid_context_parallel", False):
        _refuse(
            "hybrid_context_parallel",
            "False",
            "True",
            "each sample may be cut over other ranks, and the teacher's answer is cut one way",
        )
    # Up to 0.16 the graph of a whole iteration was a scope, later it is an implementation.
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
    _refuse_other_losses(args)
    if linked:
        _refuse_half_resets(args)
        _refuse_other_splits(config, args)
    if settings.normalization == "mean":
        _refuse_mean_of_parts()
        for name in ("rampup_batch_size", "step_batch_size_schedule"):
            if getattr(args, name, None):
                _refuse_mean(f"'mean' with {name} {getattr(args, name)}")


def _refuse_other_losses(args: Any) -> None:
    if getattr(args, "logits_load_dir", None) is not None:
        _refuse(
            "logits_load_dir", "None", repr(args.logits_load_dir), "cached logits bring a loss of their own"
        )
    if getattr(args, "export_kd_teacher_load", None):
        _refuse(
            "export_kd_teacher_load",
            "None",
            repr(args.export_kd_teacher_load),
            "ModelOpt's distillation has a loss of its own",
        )


def _refuse_half_resets(args: Any) -> None:
    """Documents in one sample, kept apart by positions or masks that the dataset makes: the teacher would not know."""
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(args, name, False):
            _refuse(
                name,
                "False",
                "True",
                "the teacher would look across the documents; dataloader_inter_document_masking tells it their edges",
            )


def _refuse_other_splits(config: Any, args: Any) -> None:
    """Context parallelism that cuts packed sequences otherwise than each by itself in the zig-zag order."""
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


class MeanOfStep:
    """Refuses normalization "mean", on every rank alike, unless a step is one micro-batch on one data-parallel rank.

    The mean weight of a step is known after its last micro-batch, when the first has gone backward long ago. How many
    there are Megatron's calculator says, whose number may grow during a run; that it is right is seen by counting.
    """

    def __init__(self, settings: DistillSettings) -> None:
        self._used = settings.normalization == "mean"
        self._begun: set[int] = set()  # chunks of the model whose micro-batch of this step has begun

    def begin(self, chunk: torch.nn.Module) -> None:
        """Before each training micro-batch of a chunk of the model. ValueError; no collectives."""
        if not self._used:
            return
        _refuse_mean_of_parts()
        if not torch.is_grad_enabled():
            return
        if id(chunk) in self._begun:
            _refuse_mean("'mean' with two micro-batches before finalize_model_grads_func ended the step")
        self._begun.add(id(chunk))

    def end_step(self) -> None:
        self._begun.clear()


def _refuse_mean_of_parts() -> None:
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    try:
        parts = get_num_microbatches()
    except AttributeError:  # it was never set up
        _refuse_mean(
            "'mean' where Megatron's init_num_microbatches_calculator has not said how many there are"
        )
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if parts * replicas > 1:
        _refuse_mean(f"'mean' with {parts} micro-batches on {replicas} ranks")


def _refuse_mean(got: str) -> None:
    _refuse(
        "normalization",
        "'none' unless a step is known to be one micro-batch on one data-parallel rank",
        got,
        "the mean over all of them is known only after the first has gone backward",
    )


def _refuse(name: str, expected: str, got: str, reason: str) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}; vcrd does not work with it, for {reason}")


def _megatron_args() -> Any:
    """The arguments of megatron.training, None where the script does not use it or has not set them."""
    if "megatron.training.global_vars" not in sys.modules:
        return None
    try:
        return importlib.import_module("megatron.training.global_vars").get_args()
    except AssertionError:
        return None
