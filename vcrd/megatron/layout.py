"""A rank's place in Megatron's parallelism, with which it joins the link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.handshake import Tokenizer
from vcrd.link.student import StudentLink
from vcrd.settings import DistillSettings


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
        vocab_size = padded if settings.vocab_size is None else settings.vocab_size
        if vocab_size > padded:
            raise expected("vocab_size", f"at most the model's {padded} columns", vocab_size)
        sequence_length = settings.sequence_length
        if sequence_length is None:
            sequence_length = getattr(chunk, "max_sequence_length", None)
        if not isinstance(sequence_length, int):
            raise expected(
                "sequence_length", "one in the settings, because the model has no max_sequence_length", "None"
            )
        group = parallel_state.get_tensor_model_parallel_group()
        return cls(
            tensor_rank=group.rank(),
            tensor_size=group.size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=parallel_state.get_context_parallel_world_size(),
            tensor_group=group if group.size() > 1 else None,
            vocab_size=vocab_size,
            padded_vocab_size=padded,
            sequence_length=sequence_length,
            device=next((p.device for p in chunk.parameters()), torch.device("cpu")),
        )

    def connect(self, settings: DistillSettings, tokenizer: Tokenizer | None) -> StudentLink:
        """Opens the student's end of the link; blocks until the teacher job has joined."""
        return StudentLink.connect(
            settings.link,
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


def plain_copy(tensor: Tensor) -> Tensor:
    """A tensor of torch's own class and of the nominal dtype. FP8 parameters have a class of their own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def unwrap(model: Any) -> torch.nn.Module:
    """The model inside Megatron's wrappers (data parallel, float16), each of which calls it `module`."""
    while hasattr(model, "module"):
        model = model.module
    return model
