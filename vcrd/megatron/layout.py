"""Where a Megatron rank stands, and how it joins the link from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

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
        """The layout of an unwrapped model; ValueError when the link cannot serve it."""
        padded = getattr(chunk, "vocab_size", None)
        if not isinstance(padded, int):
            raise ValueError(
                f"model: expected a language model with a vocab_size, got {type(chunk).__name__}"
            )
        vocab_size = padded if settings.vocab_size is None else settings.vocab_size
        if vocab_size > padded:
            raise ValueError(f"vocab_size: expected at most the model's {padded} columns, got {vocab_size}")
        sequence_length = settings.sequence_length
        if sequence_length is None:
            sequence_length = getattr(chunk, "max_sequence_length", None)
        if not isinstance(sequence_length, int):
            raise ValueError(
                "sequence_length: expected one in the settings, for the model does not name its own"
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
        """Joins the teacher's job as the student; blocks until it is there."""
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


def unwrap(model: Any) -> torch.nn.Module:
    """The model inside Megatron's wrappers (data parallel, float16), each of which calls it `module`."""
    while hasattr(model, "module"):
        model = model.module
    return model
