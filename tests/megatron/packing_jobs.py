"""A student with its teacher's weights, on sequences that are packed into rows: each token's divergence is 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jobs
import torch
from packed_pretrain import attend_within_documents
from torch import Tensor

EDGES = [0, 5, 6, jobs.SEQUENCE]


def micro_batch(number: int, edges: list[int] = EDGES) -> dict[str, Tensor]:
    """Of one row, with the positions of packed sequences and without their edges."""
    generator = torch.Generator().manual_seed(number)
    draw = torch.randint(jobs.TRUE_VOCAB, (2, 1, edges[-1]), generator=generator)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:], strict=False)])
    return {
        "tokens": draw[0],
        "labels": draw[1],
        "loss_mask": torch.ones(1, edges[-1]),
        "position_ids": positions[None],
    }


def forms() -> list[Any]:
    """The same packed row as Megatron-Core, Megatron-Bridge and NeMo hand it over."""
    from megatron.core.packed_seq_params import PackedSeqParams

    edges, filled = torch.tensor(EDGES, dtype=torch.int32), torch.tensor([[*EDGES, -1, -1]])
    both = {"cu_seqlens_q": edges, "cu_seqlens_kv": edges}
    real = torch.tensor([0, 4, 5, 9], dtype=torch.int32)  # of sequences whose last tokens are padding
    padded = {"cu_seqlens_q": real, "cu_seqlens_kv": real, "cu_seqlens_q_padded": edges}
    whole = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)
    with_padding = PackedSeqParams(qkv_format="thd", cu_seqlens_q=real, cu_seqlens_q_padded=edges)
    given = [
        {"cu_seqlens": torch.tensor([[*EDGES, jobs.SEQUENCE, jobs.SEQUENCE]])},
        {"cu_seqlens": real[None], "cu_seqlens_padded": edges[None]},
        both,
        padded,
        {"cu_seqlens": filled, "cu_seqlens_unpadded": torch.tensor([[0, 4, 5, 9, -1]])},
        {"packed_seq_params": whole},
        {"packed_seq_params": with_padding},
        {"packing_kwargs": padded},
    ]
    found: list[Any] = [{**micro_batch(number), **fields} for number, fields in enumerate(given)]
    return [*found, ({**micro_batch(len(found)), "cu_seqlens": filled}, 0, 0)]


def blocks(edges: list[int]) -> Tensor:
    """bool [1, 1, s, s]: where a token of a packed row may not look."""
    position = torch.arange(edges[-1])
    which = torch.bucketize(position, torch.tensor(edges[1:]), right=True)
    return ((which[:, None] != which) | (position[:, None] < position))[None, None]


def masked(batch: Any) -> dict[str, Any]:
    """The model's arguments in a step that keeps sequences apart by a mask, whatever the micro-batch says of edges."""
    batch = batch[0] if isinstance(batch, tuple) else batch
    names = ("position_ids", "labels", "loss_mask")
    return {"input_ids": batch["tokens"], "attention_mask": blocks(EDGES), **{n: batch[n] for n in names}}


def parametrized(batch: dict[str, Tensor], edges: list[int] | None = None) -> dict[str, Any]:
    """The model's arguments in a step that makes `PackedSeqParams` where the positions restart."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if edges is None:
        edges = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["tokens"].numel()]
    cuts = torch.tensor(edges, dtype=torch.int32)
    longest = int(cuts.diff().max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cuts,
        cu_seqlens_kv=cuts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {**masked(batch), "attention_mask": None, "packed_seq_params": params}


def train(settings, batches: list[Any], arguments: Callable[[Any], dict[str, Any]], **plug: Any) -> list[Any]:
    """Losses [b, s] of each micro-batch for a student with its teacher's weights; then the sentence of an error."""
    from vcrd.megatron import distill

    student = jobs.model(jobs.TEACHER, seed=2).train()
    found: list[Any] = []

    def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor, None]:
        given = arguments(next(data_iterator))
        return model(
            given.pop("input_ids"), given.pop("position_ids"), given.pop("attention_mask"), **given
        ), None

    plug = distill(forward_step, settings, **plug)
    iterator = iter(batches)
    try:
        for _ in batches:
            found.append(plug(iterator, student)[0].detach())
    except ValueError as error:
        found.append(str(error))
    finally:
        plug.close()
    return found


def tokens_of(batch: Any) -> Tensor:
    return (batch[0] if isinstance(batch, tuple) else batch)["tokens"]


def known_forms(settings) -> list[Any]:
    return train(settings, forms(), masked, tokens=tokens_of)


def made_in_the_step(settings) -> list[Any]:
    """Of micro-batches that say nothing of edges, not even by positions."""
    attend_within_documents()
    cuts = [EDGES, [0, jobs.SEQUENCE], [0, 1, 11, jobs.SEQUENCE], EDGES]
    batches = []
    for number, edges in enumerate(cuts):
        batch = micro_batch(number, edges)
        batches.append({"text": {**batch}, "tokens": batch["tokens"]})
    return train(settings, batches, lambda batch: parametrized(batch["text"]))


def packed_in_the_step(settings) -> list[Any]:
    """Of rows that are padded on their right when drawn, and packed by the step."""
    attend_within_documents()
    lengths = [[5, 3], [2, 6]]
    batches = []
    for number, row in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(jobs.TRUE_VOCAB, (2, 6), generator=generator)
        batches.append({"tokens": tokens, "lengths": row})

    def pack(batch: dict[str, Any]) -> dict[str, Any]:
        first, second = batch["lengths"]
        rows = zip(batch["tokens"], batch["lengths"], strict=True)
        tokens = torch.cat([row[:length] for row, length in rows])[None]
        positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
        whole = {"tokens": tokens, "position_ids": positions, "labels": tokens, "loss_mask": None}
        return parametrized(whole, [0, first, first + second])

    return train(settings, batches, pack)


def unseen(settings, kind: str) -> list[Any]:
    """What a run says of borders that the teacher does not know of; the second micro-batch of `late` has the first."""
    attend_within_documents()
    plain = {**micro_batch(0), "position_ids": torch.arange(jobs.SEQUENCE)[None]}
    packed = micro_batch(1)

    def causal(batch: dict[str, Any]) -> dict[str, Any]:
        return {**masked(batch), "attention_mask": None}

    if kind == "positions of the micro-batch":
        return train(settings, [packed], causal)
    if kind == "positions of the step":
        return train(settings, [plain], lambda batch: causal(packed))
    if kind == "a mask of the micro-batch":
        return train(settings, [{**plain, "attention_mask": blocks(EDGES)}], causal)
    if kind == "a mask of the step":
        return train(settings, [plain], lambda batch: {**masked(batch)})
    if kind == "positions, later":
        return train(settings, [plain, packed], causal)
    if kind == "edges of the step, later":
        batches = [plain, {**plain, "packed": True}]
        return train(settings, batches, lambda b: parametrized(packed) if "packed" in b else causal(b))
    assert kind == "other edges"
    return train(
        settings, [{**packed, "cu_seqlens": torch.tensor([EDGES])}], lambda b: parametrized(b, [0, 4, 12])
    )


class TEDotProductAttention(torch.nn.Module):
    """By its name attention of Transformer Engine, which reads no mask."""


def beside(settings) -> list[list[Any]]:
    """Losses or the sentence for teachers in the same ranks, which are given the student's masks and edges.

    Of one that reads both, then of one whose forward takes no edges, and of one whose attention reads no mask.
    """
    from megatron.core.models.gpt import GPTModel

    class WithoutEdges(GPTModel):
        def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            return super().forward(input_ids, position_ids, attention_mask)

    def teacher(kind: str = "") -> torch.nn.Module:
        found = jobs.model(jobs.TEACHER, seed=2)
        if kind == "edges":
            found.__class__ = WithoutEdges
        if kind == "mask":
            found.add_module("engine", TEDotProductAttention())
        return found

    attend_within_documents()
    batch = micro_batch(0)
    causal = {**masked(batch), "attention_mask": blocks([0, jobs.SEQUENCE])}
    runs = [
        (teacher(), masked),
        (teacher(), parametrized),
        (teacher("edges"), masked),
        (teacher("mask"), lambda _: dict(causal)),
        (teacher("edges"), parametrized),
        (teacher("mask"), masked),
    ]
    return [train(settings, [batch], arguments, teacher=model) for model, arguments in runs]


def steps_of_samples(settings) -> Tensor:
    """The steps that a validity is averaged over, of a row that the step packs."""
    from external_validity_jobs import layout

    from vcrd.megatron.external_validity import STEPS_KEY, ExternalValidity

    external = ExternalValidity(settings, "tokens", None)
    external.take_steps()
    external.place(layout())
    batch = {**micro_batch(0), STEPS_KEY: torch.zeros(1, jobs.SEQUENCE, dtype=torch.int64)}
    next(external.watched(iter([batch])))
    external.given = parametrized(batch)
    return external.arguments(batch["labels"], None)["steps"]
