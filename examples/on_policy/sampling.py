"""Sampling from a Megatron model in the middle of its training, over tensor and pipeline ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

# What Megatron's static cache does not support; its own engines turn sequence parallelism off to sample.
_CANNOT = {
    "sequence_parallel": False,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
}


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: list[list[int]],
    length: int,
    end: int,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """A response to each prompt, up to and with the token `end`, the same on every rank that has a part of the model.

    model: this rank's part. length: the most tokens of a prompt and its response together. vocab_size: without padding,
    which is never sampled. temperature: 0 for the most probable tokens. The samples depend on the weights, the prompts
    and the seed alone; not on the parallel layout, as far as its rounding goes.

    ValueError, before any collective, for prompts that leave no room, and for a kind of parallelism in `_CANNOT`.
    Collectives, per token: those of the forward, which gathers the logits, and one broadcast over the pipeline.
    """
    for name, value in _CANNOT.items():
        if getattr(model.config, name, value) != value:
            raise ValueError(
                f"{name}: expected {value} in a model that samples, got {getattr(model.config, name)}"
            )
    if not prompts or not all(0 < len(prompt) < length for prompt in prompts):
        got = sorted({len(prompt) for prompt in prompts})
        raise ValueError(
            f"prompts: expected at least one, each of 1 to {length - 1} tokens, got lengths {got}"
        )
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    count, starts = len(prompts), [len(prompt) for prompt in prompts]
    rows = torch.full((count, length), end)  # what follows a row's end is never read
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    # Drawn for all rows and places at once: what a row gets does not depend on when others end.
    chances = torch.rand(count, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows, chances, begun = (each.to(device) for each in (rows, chances, torch.tensor(starts)))
    cache = StaticInferenceContext(count, length)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    first, place = 0, min(starts)  # every prompt has a token before `place`
    while place < length and not bool(ended.all()):
        logits = _last_logits(model, rows[:, first:place], first, cache)
        chosen = _choose(logits, vocab_size, temperature, chances[:, place])
        spoken = (place >= begun) & ~ended  # a longer prompt is not at its end yet
        rows[:, place] = torch.where(spoken, chosen, rows[:, place])
        ended |= spoken & (chosen == end)
        first, place = place, place + 1
    model.train(was_training)
    responses = [row[start:] for row, start in zip(rows[:, :place].tolist(), starts, strict=True)]
    return [row[: row.index(end) + 1] if end in row else row for row in responses]


def _last_logits(
    model: torch.nn.Module, tokens: Tensor, first: int, cache: StaticInferenceContext
) -> Tensor | None:
    """Logits [rows, padded vocab] after tokens [rows, s], which begin at position `first`; None before the last stage.

    Megatron's own pipeline schedule takes one micro-batch through the stages. The cache has keys and values of the
    positions before `first`.
    """
    cache.sequence_len_offset = first
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device).expand_as(tokens)

    def forward_step(_: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        logits = model(tokens, positions, None, inference_context=cache, runtime_gather_output=True)
        return logits, lambda logits, non_loss_data: logits[:, -1]

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=len(tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[0] if found else None


def _choose(logits: Tensor | None, vocab_size: int, temperature: float, chances: Tensor) -> Tensor:
    """The next token of each row, int64 [rows], on every stage. Only the last stage has logits."""
    chosen = torch.empty(len(chances), dtype=torch.int64, device=chances.device)
    if logits is not None:
        logits = logits[:, :vocab_size].double()
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            # The first token at which the sum of the probabilities passes the row's chance.
            passed = (logits / temperature).softmax(-1).cumsum(-1) <= chances[:, None]
            chosen = passed.sum(-1).clamp(max=vocab_size - 1)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(chosen, last, group=parallel_state.get_pipeline_model_parallel_group())
    return chosen
