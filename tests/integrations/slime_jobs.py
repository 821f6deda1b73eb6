"""A rollout, micro-batches and reductions of the shape that slime gives to a custom loss, and the jobs of the tests."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jobs
import torch
import torch.distributed as dist
from torch import Tensor
from waiting import wait_until

TOTAL, RESPONSE = (9, 5, 12, 7), (5, 4, 6, 1)  # tokens of each sample, and of its response
PAD_MULTIPLE = 4
ROLLOUT_IDS = (0, 1, 1, 2)  # the second rollout gave two samples


def rollout(seed: int = 0) -> dict[str, Any]:
    """What slime hands to each rank of the training job, with scores beside it."""
    draw = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(r, generator=draw) < 0.7).int() for r in RESPONSE]
    for mask in masks:
        mask[0] = 1
    sums = [
        sum(int(m.sum()) for m, i in zip(masks, ROLLOUT_IDS, strict=True) if i == own) for own in ROLLOUT_IDS
    ]
    return {
        "tokens": [torch.randint(jobs.TRUE_VOCAB, (n,), generator=draw) for n in TOTAL],
        "total_lengths": list(TOTAL),
        "response_lengths": list(RESPONSE),
        "loss_masks": masks,
        "rollout_mask_sums": torch.tensor(sums, dtype=torch.float32),
        "student_validity": [0.9, 0.2, [0.1, 0.3, 0.5, 0.7, 0.9, 1.0], 0.5],
        "teacher_validity": [1.0, [0.2, 0.4, 0.6, 0.8], 0.3, 1.0],
        "multimodal_train_inputs": [None] * 4,
    }


def student_logits(sample: int) -> Tensor:
    """Of all tokens of one sample, [tokens, padded vocabulary]: a model's output is not the subject of these tests."""
    draw = torch.Generator().manual_seed(40 + sample)
    return 1.5 * torch.randn(TOTAL[sample], jobs.STUDENT.vocab_size, generator=draw)


def on_rank(values: Tensor, rank: int, size: int) -> Tensor:
    """A context-parallel rank's part of one sample's values: the chunks r and 2 size - 1 - r, after padding with 0."""
    if size == 1:
        return values
    chunk = -(-len(values) // (2 * size))
    padded = torch.cat([values, values.new_zeros(2 * size * chunk - len(values), *values.shape[1:])])
    chunks = padded.split(chunk)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def row_of(parts: Sequence[Tensor], context: tuple[int, int], multiple: int) -> Tensor:
    """One row [tokens of this rank, ...] of per-sample values, padded to a multiple."""
    row = torch.cat([on_rank(part, *context) for part in parts])
    return torch.cat([row, row.new_zeros(-len(row) % multiple, *row.shape[1:])])


def micro_batch(
    data: dict[str, Any], samples: Sequence[int], context: tuple[int, int], multiple: int
) -> dict:
    """slime's batch: lists per sample, and masks that are aligned with the positions that predict."""
    aligned = []
    for i in samples:
        prompt = TOTAL[i] - RESPONSE[i]
        aligned.append(torch.nn.functional.pad(data["loss_masks"][i], (prompt - 1, 1)))
    return {
        "unconcat_tokens": [data["tokens"][i] for i in samples],
        "tokens": row_of([data["tokens"][i] for i in samples], context, multiple)[None],
        "full_loss_masks": row_of(aligned, context, multiple)[None],
        "multimodal_train_inputs": None,
        "rollout_mask_sums": [data["rollout_mask_sums"][i] for i in samples],
        **{
            name: [data[name][i] for i in samples]
            for name in ("total_lengths", "response_lengths", "loss_masks")
        },
    }


def sum_of_sample_mean(batch: dict, context: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """slime's reduction of [response tokens of this rank]: for each sample the masked sum over its rollout's count."""
    masks, lengths = [], []
    for total, response, mask in zip(
        batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], strict=True
    ):
        predicts = torch.zeros(total, dtype=torch.bool)
        predicts[total - response - 1 : total - 1] = True
        values = torch.zeros(total).masked_scatter(predicts, mask.float())
        masks.append(on_rank(values, *context)[on_rank(predicts, *context)])
        lengths.append(len(masks[-1]))

    def reduce(values: Tensor) -> Tensor:
        parts = zip(values.split(lengths), masks, batch["rollout_mask_sums"], strict=True)
        return sum((part * mask).sum() / denominator for part, mask, denominator in parts)

    return reduce


class WrappedGroup(dist.ProcessGroup):
    """A group as slime wraps it: torch's own inside, which torch's tables alone know."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self.group = group

    def rank(self) -> int:
        return self.group.rank()

    def size(self) -> int:
        return self.group.size()


def train(
    environment: dict[str, str], tensor: int, pipeline: int, context: int
) -> list[SimpleNamespace] | None:
    """A training job of three rollouts: all samples in one micro-batch; each in one; in one, asked for late.

    For each rollout its loss and figures on this rank, and the gradient of this rank's columns at each sample's tokens
    that it holds, elsewhere 0. None before the last stage.
    """
    from megatron.core import parallel_state

    os.environ.update(environment)
    if context > 1:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)
    if tensor > 1:
        own = WrappedGroup(parallel_state.get_tensor_model_parallel_group())
        parallel_state.get_tensor_model_parallel_group = lambda: own
    from vcrd.integrations import slime

    data, found = rollout(), []
    slime.init(arguments(tensor, context))
    for number, plan in enumerate(([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]])):
        if number < 2:
            slime.ask_ahead(None, number, {**data, "micro_batch_indices": plan})
        if not parallel_state.is_pipeline_last_stage():
            continue
        if number == 1:  # answers come while nothing has called the loss
            before = slime._student._link.bytes_received
            wait_until(lambda before=before: slime._student._link.bytes_received > before, 60, "an answer")
        if number < 2 or environment.get("VCRD_VALIDITY") != "scores":
            found.append(one_step(slime, data, plan))
    dist.barrier()
    slime.close()
    return found or None


def one_step(slime: Any, data: dict[str, Any], plan: list[list[int]]) -> SimpleNamespace:
    from megatron.core import parallel_state

    context = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_group()
    multiple = PAD_MULTIPLE * tensor.size()
    leaves = [student_logits(i).chunk(tensor.size(), -1)[tensor.rank()].requires_grad_() for i in range(4)]
    total, figures = 0.0, {}
    for samples in plan:
        batch = micro_batch(data, samples, context, multiple)
        logits = row_of([leaves[i] for i in samples], context, multiple)[None]
        loss, log = slime.loss(None, batch, logits, sum_of_sample_mean(batch, context))
        loss.backward()
        total += float(loss.detach())
        for name, value in log.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    return SimpleNamespace(loss=total, figures=figures, gradients=[leaf.grad for leaf in leaves])


def arguments(tensor: int = 1, context: int = 1, **more: object) -> Namespace:
    """slime's arguments, as far as the loss reads them."""
    return Namespace(
        **{
            "vocab_size": jobs.TRUE_VOCAB,
            "padded_vocab_size": jobs.STUDENT.vocab_size,
            "max_position_embeddings": jobs.SEQUENCE,
            "data_pad_size_multiplier": PAD_MULTIPLE,
            "context_parallel_size": context,
            "recompute_loss_function": False,
            "allgather_cp": False,
            "use_critic": False,
            **more,
        }
    )


def truth(settings: dict[str, dict[str, Any]]) -> dict[str, SimpleNamespace]:
    """For each of the settings: the rollout's loss, figures and gradients in float64, each sample by itself."""
    teacher = jobs.model(jobs.TEACHER, seed=2).eval()
    data = rollout()
    answers = []
    with torch.no_grad():
        for tokens in data["tokens"]:
            answers.append(teacher(tokens[None], torch.arange(len(tokens))[None], None)[0])
    return {name: reference_of(data, answers, **options) for name, options in settings.items()}


def reference_of(
    data: dict[str, Any], answers: list[Tensor], validity: str, divergence: str = "forward_kl"
) -> SimpleNamespace:
    from vcrd.loss import reference

    total, weight_sum, gradients = 0.0, 0.0, []
    for i, answer in enumerate(answers):
        first, last = TOTAL[i] - RESPONSE[i] - 1, TOTAL[i] - 1
        whole = student_logits(i).double().requires_grad_()
        mask, labels = data["loss_masks"][i], data["tokens"][i][1:][first:last]
        stats = reference.statistics(
            whole[first:last],
            answer[first:last],
            labels,
            name=divergence,
            vocab_size=jobs.TRUE_VOCAB,
            mask=mask,
        )
        if validity == "scores":
            given = (data["student_validity"][i], data["teacher_validity"][i])
            logs = [torch.as_tensor(v, dtype=torch.float64).expand(RESPONSE[i]).log() for v in given]
        else:
            logs = reference.log_validities(stats, validity)
        weight, _ = reference.weights(*logs, mask=mask)
        share = mask / data["rollout_mask_sums"][i]
        loss = (weight * stats["divergence"] * share).sum()
        loss.backward()
        total, weight_sum = total + float(loss.detach()), weight_sum + float((weight * share).sum())
        gradients.append(whole.grad)
    return SimpleNamespace(loss=total, weight=weight_sum, gradients=gradients)
