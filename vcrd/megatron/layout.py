"""The process groups of a model, and a rank's place in them, with which it joins the link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.handshake import Tokenizer
from vcrd.settings import DistillSettings

# For each field of `Groups`: its name in a ProcessGroupCollection, and the same group in `parallel_state`.
_PLACES = {
    "tensor": ("tp", parallel_state.get_tensor_model_parallel_group),
    "pipeline": ("pp", parallel_state.get_pipeline_model_parallel_group),
    "model": ("mp", parallel_state.get_model_parallel_group),
    "context": ("cp", parallel_state.get_context_parallel_group),
    "tensor_context": ("tp_cp", parallel_state.get_tensor_and_context_parallel_group),
    "data": ("dp", parallel_state.get_data_parallel_group),
    "data_context": ("dp_cp", partial(parallel_state.get_data_parallel_group, with_context_parallel=True)),
}


@dataclass(frozen=True)
class Groups:
    """The process groups of a model's parallelism that this rank is in. model: of tensor and pipeline parallelism."""

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup
    context: dist.ProcessGroup
    tensor_context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup

    @classmethod
    def of(cls, chunk: torch.nn.Module) -> Groups:
        """Those of the unwrapped model's `pg_collection`; those of Megatron's `parallel_state` that it does not have.

        ValueError if neither has one. No collectives.
        """
        own = getattr(chunk, "pg_collection", None)
        remat = getattr(own, "gtp_remat", None)
        if remat is not None and remat.size() > 1:
            own = None  # its data-parallel groups leave out ranks that have micro-batches of their own
        found = {}
        for name, (key, global_group) in _PLACES.items():
            found[name] = getattr(own, key, None)
            if found[name] is None:
                try:
                    found[name] = global_group()
                except AssertionError:
                    raise expected(
                        "model",
                        f"a process group {key!r} in its pg_collection, or Megatron's parallel_state initialized",
                        "neither",
                    ) from None
        return cls(**found)

    @property
    def last_stage(self) -> bool:
        """Whether this rank is on the last stage of the pipeline."""
        return self.pipeline.rank() == self.pipeline.size() - 1


@dataclass(frozen=True)
class Layout:
    """This rank's place in the model's parallelism. vocab_size: true columns; padded_vocab_size: the model's."""

    tensor_rank: int
    tensor_size: int
    data_rank: int  # without context parallelism, as Megatron counts the samples' replicas
    data_size: int
    context_rank: int
    context_size: int
    tensor_group: dist.ProcessGroup | None
    vocab_size: int
    padded_vocab_size: int
    sequence_length: int
    device: torch.device
    groups: Groups

    @property
    def weight_group(self) -> dist.ProcessGroup | None:
        """The ranks of this stage that process other tokens at the same time; None if there are none."""
        group = self.groups.data_context
        return group if group.size() > 1 else None

    @property
    def asks(self) -> bool:
        """Whether this rank asks the teacher for its data rank's micro-batches."""
        return self.tensor_rank == 0 and self.context_rank == 0

    @classmethod
    def of(cls, chunk: torch.nn.Module, settings: DistillSettings) -> Layout:
        """The layout of an unwrapped model; ValueError if the link cannot serve it."""
        padded = getattr(chunk, "vocab_size", None)
        if not isinstance(padded, int):
            raise expected("model", "a language model with a vocab_size", type(chunk).__name__)
        vocab_size = settings.vocab_size
        if vocab_size is None:  # Megatron-Bridge's configurations have the true one
            vocab_size = getattr(chunk.config, "vocab_size", None) or padded
        if vocab_size > padded:
            raise expected("vocab_size", f"at most the model's {padded} columns", vocab_size)
        sequence_length = settings.sequence_length
        if sequence_length is None:
            sequence_length = getattr(chunk, "max_sequence_length", None)
        if not isinstance(sequence_length, int):
            raise expected(
                "sequence_length", "one in the settings, because the model has no max_sequence_length", "None"
            )
        groups = Groups.of(chunk)
        return cls(
            tensor_rank=groups.tensor.rank(),
            tensor_size=groups.tensor.size(),
            data_rank=groups.data.rank(),
            data_size=groups.data.size(),
            context_rank=groups.context.rank(),
            context_size=groups.context.size(),
            tensor_group=groups.tensor if groups.tensor.size() > 1 else None,
            vocab_size=vocab_size,
            padded_vocab_size=padded,
            sequence_length=sequence_length,
            device=next((p.device for p in chunk.parameters()), torch.device("cpu")),
            groups=groups,
        )

    def place(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What a teacher's answers depend on, as the arguments of `StudentLink.connect`."""
        return dict(
            vocab_size=self.vocab_size,
            padded_vocab_size=self.padded_vocab_size,
            sequence_length=self.sequence_length,
            tensor_rank=self.tensor_rank,
            tensor_size=self.tensor_size,
            data_rank=self.data_rank,
            data_size=self.data_size,
            context_rank=self.context_rank,
            context_size=self.context_size,
            device=self.device,
            tokenizer=tokenizer,
        )


def schedule_of(chunk: torch.nn.Module) -> Callable[..., Any]:
    """Megatron's forward_backward_func for an unwrapped model that does not interleave its stages, over its groups."""
    if parallel_state.model_parallel_is_initialized():
        return get_forward_backward_func()
    pipeline = Groups.of(chunk).pipeline
    return partial(
        get_forward_backward_func(pipeline.size(), None),
        pg_collection=chunk.pg_collection,
        p2p_communicator=P2PCommunicator(pipeline, chunk.config),
    )


def plain_copy(tensor: Tensor) -> Tensor:
    """A tensor of torch's own class and of the nominal dtype. FP8 parameters have a class of their own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def unwrap(model: Any) -> torch.nn.Module:
    """The model inside Megatron's wrappers (data parallel, float16), each of which calls it `module`."""
    while hasattr(model, "module"):
        model = model.module
    return model
