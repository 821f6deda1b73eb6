"""Packed sequences: edges are found wherever Megatron's users have them, and borders without edges are refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jobs
import packing_jobs
import pytest
import torch
from test_distillation import settings
from worlds import World, run_worlds

from vcrd.link.requests import Request
from vcrd.megatron.compatibility import check_compatibility
from vcrd.megatron.packing import PackedInputs, packed
from vcrd.megatron.prefetch import question_of

ROW = torch.arange(12).view(1, 12)
ROWS = torch.arange(12).view(2, 6)


@dataclass
class Sample:
    """As the batches of Energon are: fields, not keys."""

    cu_seqlens_q: torch.Tensor | None = None
    packed_seq_params: SimpleNamespace | None = None


def thd(edges: list[int], **fields) -> SimpleNamespace:
    return SimpleNamespace(qkv_format="thd", cu_seqlens_q=torch.tensor(edges), **fields)


@pytest.mark.parametrize(
    ("batch", "edges"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 5, 6, 12])}, [0, 5, 6, 12]),
        ({"cu_seqlens_kv": torch.tensor([0, 5, 12], dtype=torch.int32)}, [0, 5, 12]),
        ({"cu_seqlens_q": torch.tensor([[0, 5, 6, 12]]), "cu_seqlens_kv": None}, [0, 5, 6, 12]),
        ({"cu_seqlens": [0, 5, 12]}, [0, 5, 12]),
        ({"cu_seqlens": torch.tensor([[0, 5, 12, -1, -1]])}, [0, 5, 12]),
        ({"cu_seqlens": torch.tensor([0, 5, 12, -1000])}, [0, 5, 12]),
        ({"cu_seqlens": torch.tensor([[[0, 5, 12, 12]]])}, [0, 5, 12]),
        (
            {"cu_seqlens": torch.tensor([[0, 8, 12]]), "cu_seqlens_unpadded": torch.tensor([[0, 7, 9]])},
            [0, 8, 12],
        ),
        (
            {"cu_seqlens": torch.tensor([[0, 7, 9]]), "cu_seqlens_padded": torch.tensor([[0, 8, 12]])},
            [0, 8, 12],
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 7, 9]), "cu_seqlens_q_padded": torch.tensor([0, 8, 12])},
            [0, 8, 12],
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 7, 9]), "cu_seqlens_kv_padded": torch.tensor([0, 8, 12])},
            [0, 8, 12],
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 5, 8])},
            [0, 5, 8, 12],
        ),  # padding at the end is seen by nobody else
        ({"cu_seqlens_q": torch.tensor([0, 0, 5, 5, 12])}, [0, 5, 12]),
        ({"packed_seq_params": thd([0, 5, 12])}, [0, 5, 12]),
        ({"packed_seq_params": thd([0, 4, 9], cu_seqlens_q_padded=torch.tensor([0, 5, 12]))}, [0, 5, 12]),
        ({"packed_seq_params": {"cu_seqlens_q": torch.tensor([0, 5, 12])}}, [0, 5, 12]),
        ({"packing_kwargs": {"cu_seqlens_kv_padded": torch.tensor([0, 5, 12])}}, [0, 5, 12]),
        (({"cu_seqlens": torch.tensor([[0, 5, 12, -1]])}, 3, 0), [0, 5, 12]),
        (Sample(cu_seqlens_q=torch.tensor([0, 5, 12])), [0, 5, 12]),
        (Sample(packed_seq_params=thd([0, 5, 12])), [0, 5, 12]),
        (Sample(packed_seq_params=SimpleNamespace(qkv_format=None, cu_seqlens_q=None)), []),
        ({"packed_seq_params": SimpleNamespace(qkv_format="sbhd", cu_seqlens_q=torch.tensor([0, 5]))}, []),
        ({"cu_seqlens": None, "max_seqlen": torch.tensor([12])}, []),
        (Sample(), []),
        (ROW, []),
    ],
)
def test_edges_are_found_in_every_form(batch, edges):
    row, found = packed(batch, ROW)
    assert row.tolist() == ROW.tolist() and found.tolist() == edges and found.dtype == torch.int64
    if not isinstance(batch, (tuple, torch.Tensor)):
        # Where the micro-batch has none, among the model's arguments.
        arguments = batch if isinstance(batch, dict) else vars(batch)
        assert packed({"tokens": ROW}, ROW, arguments)[1].tolist() == edges


@pytest.mark.parametrize(
    ("given", "edges"),
    [
        ([[0, 2, 6, -1], [0, 5, 6, -1]], [0, 2, 6, 11, 12]),
        ([[0, 6, -1, -1], [0, 1, 2, 6]], [0, 6, 7, 8, 12]),
        ([[0, 2, 4], [0, 5, 5]], [0, 2, 4, 6, 11, 12]),
        ([0, 2, 6, 12], [0, 2, 6, 12]),
        ([[0, 7, 12]], [0, 7, 12]),
    ],
)
def test_edges_of_several_rows_are_those_of_one(given, edges):
    row, found = packed({"cu_seqlens_q": torch.tensor(given)}, ROWS)
    assert row.tolist() == ROW.tolist() and found.tolist() == edges


@pytest.mark.parametrize(
    ("key", "given", "tokens"),
    [
        ("cu_seqlens_q", [0, 5, 13], ROW),
        ("cu_seqlens_q", [1, 5, 12], ROW),
        ("cu_seqlens", [0, 7, 5, 12], ROW),
        ("cu_seqlens", [0, 5, 12, 0, 0], ROW),
        ("cu_seqlens", [0, 5, -1, 12], ROW),
        ("cu_seqlens", [-1, -1], ROW),
        ("cu_seqlens_padded", [[0, 6], [0, 7]], ROWS),
        ("cu_seqlens_q", [0, 3, 6], ROWS),  # of one row or of both?
        ("cu_seqlens_q", [[0, 6]] * 3, ROWS),
        ("cu_seqlens_q", [0.0, 5.0, 12.0], ROW),
        ("cu_seqlens_q", [], ROW),
        ("cu_seqlens_unpadded", [0, 5, 12], ROW),
        ("cu_seq_lens_q", [0, 5, 12], ROW),
    ],
)
def test_edges_that_are_none_are_one_sentence(key, given, tokens):
    with pytest.raises(ValueError, match=f"^{key}: expected .*edges.*, got "):
        packed({key: torch.tensor(given)}, tokens)


def of(**fields) -> dict:
    return {"tokens": ROW, **fields}


RESTARTS = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
CAUSAL = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
UNTIL_5 = torch.tensor([[1.0] * 5 + [0.0] * 7])


@pytest.mark.parametrize(
    "batch",
    [
        of(position_ids=ROW),
        of(position_ids=ROW + 3),  # the same to rotary embeddings
        of(position_ids=ROW[0]),
        of(position_ids=RESTARTS, cu_seqlens=torch.tensor([0, 5, 6, 12])),
        of(position_ids=ROW, cu_seqlens=torch.tensor([0, 5, 6, 12])),  # rotary embeddings count by edges
        of(position_ids=RESTARTS, loss_mask=UNTIL_5),  # padding on the right
        of(position_ids=RESTARTS, labels=torch.where(UNTIL_5 > 0, ROW, -100)),
        of(position_ids=torch.zeros(3, 1, 12)),  # axes of images
        of(attention_mask=CAUSAL),
        of(attention_mask=~CAUSAL),
        of(attention_mask=CAUSAL.float() * -1e4),
        of(attention_mask=(~CAUSAL).long()[0]),
        of(attention_mask=torch.ones(1)),  # what NeMo puts there beside edges
        of(attention_mask=torch.ones(1, 12)),
        of(attention_mask=UNTIL_5, loss_mask=UNTIL_5),
        of(attention_mask=CAUSAL | (UNTIL_5 == 0), loss_mask=UNTIL_5),
        of(attention_mask=packing_jobs.blocks([0, 5, 12]), loss_mask=UNTIL_5),
        of(attention_mask=packing_jobs.blocks([0, 5, 6, 12]), cu_seqlens=torch.tensor([0, 5, 6, 12])),
        {"tokens": ROWS, "position_ids": torch.arange(6).expand(2, 6), "attention_mask": CAUSAL[..., :6, :6]},
    ],
)
def test_what_shows_no_border_is_asked_for(batch):
    tokens, *_ = question_of(batch, "tokens")
    assert tokens.numel() == 12


@pytest.mark.parametrize(
    "batch",
    [
        of(position_ids=RESTARTS),
        of(position_ids=RESTARTS[0]),
        of(position_ids=RESTARTS, cu_seqlens=torch.tensor([0, 12])),
        of(position_ids=RESTARTS, cu_seqlens=torch.tensor([0, 5, 12])),
        of(position_ids=RESTARTS, loss_mask=torch.tensor([[1.0] * 5 + [0.0] * 6 + [1.0]])),
        of(position_ids=ROW * 2),
        of(position_ids=torch.tensor([[1, 1, *range(10)]])),  # padding on the left
        of(attention_mask=packing_jobs.blocks([0, 5, 6, 12])),
        of(attention_mask=~packing_jobs.blocks([0, 5, 12])),
        of(attention_mask=packing_jobs.blocks([0, 5, 12]).float() * -1e4),
        of(attention_mask=packing_jobs.blocks([0, 5, 12])[0], cu_seqlens=torch.tensor([0, 12])),
        of(attention_mask=torch.zeros(1, 1, 12, 12, dtype=torch.bool)),  # each token sees all
        of(attention_mask=1 - UNTIL_5),  # padding on the left
        of(attention_mask=CAUSAL | CAUSAL.transpose(-1, -2).roll(-1, -1)),  # a hole
        {"tokens": ROWS, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])},
        {"tokens": ROWS, "attention_mask": torch.cat([CAUSAL[..., :6, :6], packing_jobs.blocks([0, 3, 6])])},
    ],
)
def test_borders_without_edges_are_one_sentence(batch):
    name = "position_ids" if "position_ids" in batch else "attention_mask"
    with pytest.raises(ValueError, match=f"^{name}: expected .* edges of the sequences .*, got "):
        question_of(batch, "tokens")


def check_no_divergence(losses: list, count: int) -> None:
    assert len(losses) == count, losses
    for loss in losses:
        assert not isinstance(loss, str) and loss.abs().max() < 1e-6, loss


PLAIN = {"validity": "uniform"}


def test_a_teacher_with_the_students_weights_diverges_nowhere_in_any_form():
    chosen = settings(**PLAIN)
    ((losses,), _) = run_worlds(
        World(packing_jobs.known_forms, arguments=(chosen,)), World(jobs.teacher_job, arguments=(chosen,))
    )
    check_no_divergence(losses, 9)


@pytest.mark.parametrize(("credits", "run"), [(2, "made_in_the_step"), (0, "packed_in_the_step")])
def test_edges_are_taken_from_the_models_own_arguments(credits, run):
    chosen = settings(**PLAIN, credits=credits)
    ((losses,), _) = run_worlds(
        World(getattr(packing_jobs, run), arguments=(chosen,)), World(jobs.teacher_job, arguments=(chosen,))
    )
    check_no_divergence(losses, 4 if run == "made_in_the_step" else 2)


@pytest.mark.parametrize(
    ("kind", "ranks", "before", "sentence"),
    [
        ("positions of the micro-batch", 2, 0, "position_ids: expected positions that ascend"),
        ("positions of the step", 1, 0, "position_ids: expected positions that ascend"),
        ("a mask of the micro-batch", 1, 0, "attention_mask: expected a causal mask"),
        ("a mask of the step", 2, 0, "attention_mask: expected a causal mask"),
        ("positions, later", 1, 1, "position_ids: expected positions that ascend"),
        ("edges of the step, later", 1, 1, "cu_seqlens_q: expected in the micro-batch"),
        ("other edges", 1, 0, "cu_seqlens_q: expected among the model's arguments the edges"),
    ],
)
def test_borders_that_the_teacher_does_not_know_end_the_run(kind, ranks, before, sentence):
    chosen = settings(**PLAIN, credits=0 if before and "positions" in kind else 2)
    (found, _) = run_worlds(
        World(packing_jobs.unseen, ranks, tensor=ranks, arguments=(chosen, kind)),
        World(jobs.teacher_job, arguments=(chosen,)),
    )
    assert len(found) == ranks
    for losses in found:
        assert len(losses) == before + 1 and str(losses[-1]).startswith(sentence), losses
        check_no_divergence(losses[:-1], before)


def test_a_teacher_in_the_same_ranks_keeps_sequences_apart_as_the_student_does_or_refuses():
    chosen = settings(**PLAIN)
    ((found,),) = run_worlds(World(packing_jobs.beside, arguments=(chosen,)))
    for losses in found[:4]:
        check_no_divergence(losses, 1)
    (edges,), (mask,) = found[4:]
    assert edges.startswith("teacher: expected a model whose forward takes packed_seq_params"), edges
    assert mask.startswith("attention_mask: expected a causal mask"), mask


def test_samples_that_the_step_packs_have_steps_of_their_own():
    chosen = settings()
    ((steps,),) = run_worlds(World(packing_jobs.steps_of_samples, arguments=(chosen,)))
    assert len(steps.unique()) == 3


class MambaMixer(torch.nn.Module):
    """By its name a layer with a state."""


def test_a_teacher_with_a_state_is_told_where_it_ends_or_refuses():
    request = Request(0, 0, ROW, torch.tensor([0, 5, 12]))
    chunk = torch.nn.ModuleList([MambaMixer(), packing_jobs.TEDotProductAttention()])
    chunk.config = SimpleNamespace()
    given = PackedInputs(chunk, torch.device("cpu")).of(request)[2]["packed_seq_params"]
    assert given.cu_seqlens_q.tolist() == [0, 5, 12]
    if hasattr(given, "seq_idx"):
        assert given.seq_idx.tolist() == [[0] * 5 + [1] * 7]
    chunk = torch.nn.ModuleList([MambaMixer()])
    chunk.config = SimpleNamespace()
    with pytest.raises(ValueError, match="expected attention of Transformer Engine beside MambaMixer"):
        PackedInputs(chunk, torch.device("cpu")).of(request)


@pytest.mark.parametrize(
    ("config", "args", "name"),
    [
        ({"cp_partition_mode": "contiguous"}, {}, "cp_partition_mode"),
        ({}, {"dataloader_inter_document_masking": True}, "dataloader_inter_document_masking"),
    ],
)
def test_other_splits_of_packed_rows_are_refused_with_context_parallelism(config, args, name):
    def check(size: int) -> None:
        chunk = SimpleNamespace(config=SimpleNamespace(context_parallel_size=size, **config))
        check_compatibility(chunk, SimpleNamespace(**args))

    check(1)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        check(2)
