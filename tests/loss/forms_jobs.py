"""What each rank of a gloo world runs in test_forms_sharded.py; imported by the spawned processes."""

from __future__ import annotations

import re
from collections import Counter

import torch
import torch.distributed as dist
from cases import assert_stats, backward, call
from forms import HiddenCase, MixedCase, TopKCase, moved
from sharded_jobs import COLLECTIVES, padded, shard, widths_of

import vcrd
from vcrd.loss.config import DIVERGENCES


def teacher_shard(form, rank: int, widths: list[int], device: torch.device):
    """The same table or states on every rank, and this rank's rows of the output layer."""
    if isinstance(form, vcrd.TopKLogits):
        return moved(form, device)
    if isinstance(form, vcrd.MixedLogits):
        return vcrd.MixedLogits(
            tuple(teacher_shard(one, rank, widths, device) for one in form.teachers), form.weights
        )
    if isinstance(form, vcrd.DenseLogits):
        row_max = None if form.row_max is None else form.row_max.to(device)
        return vcrd.DenseLogits(shard(padded(form.logits, sum(widths)), rank, widths).to(device), row_max)
    rows = shard(padded(form.weight.T, sum(widths)), rank, widths).T
    return vcrd.HiddenStates(form.states.to(device), rows.to(device), form.scale, form.softcap)


def without_padding(form, vocab: int):
    if isinstance(form, vcrd.HiddenStates):
        return vcrd.HiddenStates(form.states, form.weight[:vocab], form.scale, form.softcap)
    if isinstance(form, vcrd.DenseLogits):
        return vcrd.DenseLogits(form.logits[..., :vocab], form.row_max)
    if isinstance(form, vcrd.MixedLogits):
        return vcrd.MixedLogits(tuple(without_padding(one, vocab) for one in form.teachers), form.weights)
    return form


def sharded_call(
    case: TopKCase | HiddenCase, rank: int, device: torch.device, widths, teacher_widths=None, **extra
):
    """The loss on this rank's shards, backward done. Returns the statistics and this shard's gradient, on the CPU."""
    student, teacher, labels, mask = case.tensors()
    student = shard(padded(student[..., : case.vocab], sum(widths)), rank, widths).to(device).requires_grad_()
    teacher = teacher_shard(without_padding(teacher, case.vocab), rank, teacher_widths or widths, device)
    mask = None if mask is None else mask.to(device)
    stats = call(case, student, teacher, labels.to(device), mask, group=dist.group.WORLD, **extra)
    return backward(case, stats, student)


def check(
    case: TopKCase | HiddenCase, rank: int, device: torch.device, widths, teacher_widths=None, **extra
) -> None:
    stats, gradient = sharded_call(case, rank, device, widths, teacher_widths, **extra)
    expected, full = case.expected()
    assert_stats(stats, expected, 2e-6 if isinstance(case, TopKCase) else 5e-6)
    full = torch.nn.functional.pad(full[..., : case.vocab], (0, sum(widths) - case.vocab))
    start = sum(widths[:rank])
    mine = full[..., start : start + widths[rank]]
    assert gradient.shape == mine.shape
    error = (gradient.double() - mine).abs()
    if case.student_dtype == torch.float32:
        scale = full.abs().max().clamp(min=0.02) if full.numel() else 1
        assert (error <= 1e-5 * scale).all(), (case, rank)
    else:
        best = (mine.to(case.student_dtype).double() - mine).abs().max()
        assert (error <= best + 1e-6).all(), (case, rank)
    assert (gradient[..., max(0, case.vocab - start) :] == 0).all()


def everything(rank: int, device: torch.device) -> None:
    """Every divergence over even and uneven shards, small blocks, masks, and shards of padding or of ids alone."""
    size = dist.get_world_size()
    for number, divergence in enumerate(DIVERGENCES):
        settings = dict(divergence=divergence, seed=number, with_mask=number % 2 == 0)
        extra = dict(inplace_gradient=number % 2 == 1, _block_bytes=(1, 4 * 200, 1 << 20)[number % 3])
        for vocab in (65, 257):
            uneven = (
                [vocab // 2, vocab - vocab // 2 - 3, 8] if size == 3 else [vocab // 3, vocab - vocab // 3 + 5]
            )
            for widths in (widths_of(vocab, size), uneven):
                for k in (1, 8, vocab):
                    for scale in (3.0, 300.0):
                        check(
                            TopKCase((5,), vocab, scale=scale, k=k, **settings), rank, device, widths, **extra
                        )
                check(HiddenCase((5,), vocab, softcap=20.0, **settings), rank, device, widths, **extra)
                check(MixedCase((5,), vocab, **settings), rank, device, widths, **extra)
    for dtype in (torch.bfloat16, torch.float16):
        widths = widths_of(1037, size)
        check(TopKCase((5,), 1037, student_dtype=dtype), rank, device, widths)
        check(HiddenCase((5,), 1037, student_dtype=dtype, teacher_dtype=torch.bfloat16), rank, device, widths)
    # The last shard's padding may differ from the student's; whole shards may be padding.
    check(HiddenCase((4,), 90), rank, device, [64] * size, [64] * (size - 1) + [128])
    check(HiddenCase((4,), 5), rank, device, [8] * size)
    check(MixedCase((4,), 5), rank, device, [8] * size)
    check(TopKCase((4,), 5, k=2), rank, device, [8] * size)
    check(TopKCase((0,), 64), rank, device, [32] * size)
    shard_without_a_tail(rank, size, device)
    ranks_agree(rank, size, device)


def shard_without_a_tail(rank: int, size: int, device: torch.device) -> None:
    """The first shard's columns are all among the ids, the others hold the tail; and the other way round."""
    for columns in (range(4), range(30, 34)):
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(3, 40, generator=generator)
        logits[:, list(columns)] += 9
        logprobs, ids = logits.log_softmax(-1).topk(4, -1)
        log_tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
        form = vcrd.TopKLogits(logprobs, ids, log_tail)
        assert set(ids.flatten().tolist()) == set(columns)
        case = TopKCase((3,), 40, divergence="jeffreys")
        whole = torch.randn(3, 40, generator=generator)
        exact = whole.double().requires_grad_()
        expected = case.statistics(exact, form, None, None)
        expected["divergence"].sum().backward()
        widths = [4, 36] if size == 2 else [4, 26, 10]
        mine = shard(whole, rank, widths).to(device).requires_grad_()
        stats = call(case, mine, moved(form, device), None, None, group=dist.group.WORLD)
        stats.divergence.sum().backward()
        torch.testing.assert_close(
            stats.divergence.cpu().double(), expected["divergence"].detach(), rtol=2e-6, atol=4e-6
        )
        torch.testing.assert_close(
            mine.grad.cpu().double(), shard(exact.grad, rank, widths), rtol=1e-5, atol=1e-6
        )


def ranks_agree(rank: int, size: int, device: torch.device) -> None:
    """Bit for bit, also where ranks cut their rows into different blocks."""
    for kind in (TopKCase, HiddenCase, MixedCase):
        case = kind((6,), 900, divergence="jsd")
        widths = [700, 200] if size == 2 else [700, 150, 50]
        stats, _ = sharded_call(case, rank, device, widths, _block_bytes=4 * 700)
        for field in stats:
            copies = [torch.empty_like(field) for _ in range(size)]
            dist.all_gather(copies, field.contiguous())
            assert all(torch.equal(copy, copies[0]) for copy in copies)


def count_collectives(rank: int, device: torch.device) -> None:
    """However many blocks: one all-gather, another for the tail or for the scale of mixed teachers; backward none.

    And one all-reduce where the divergence has a mixture of both models.
    """
    counts: Counter[str] = Counter()
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for divergence in DIVERGENCES:
        for kind, gathers in ((TopKCase, 2), (HiddenCase, 1), (MixedCase, 2)):
            case = kind((7,), 32, divergence=divergence)
            student, teacher, labels, _ = case.tensors(device)
            student = shard(student, rank, [16, 16]).requires_grad_()
            counts.clear()
            stats = call(
                *(case, student, teacher_shard(teacher, rank, [16, 16], device), labels, None),
                group=dist.group.WORLD,
                _block_bytes=2 * 16 * 4,
            )
            mixture = {"all_reduce": 1} if divergence in ("jsd", "skew_kl", "skew_reverse_kl") else {}
            assert dict(counts) == {all_gather: gathers, **mixture}, counts
            counts.clear()
            (stats.divergence + stats.cross_entropy).sum().backward()
            assert not counts, counts


def raises_everywhere(rank: int, device: torch.device) -> None:
    """What is wrong on one rank is one sentence on all, at once; and the group works afterwards."""
    student = torch.zeros(3, 8, device=device)

    def topk(k=2, dtype=torch.float32, leading=3):
        ids = torch.arange(k, device=device).expand(leading, k)
        one = torch.full((leading,), -1.0, device=device)
        return vcrd.TopKLogits(-ids.to(dtype), ids, one)

    def hidden(size=4, rows=8, dtype=torch.float32, weight=torch.float32, scale=1.0, softcap=None):
        states = torch.zeros(3, size, device=device, dtype=dtype)
        return vcrd.HiddenStates(states, torch.zeros(rows, size, device=device, dtype=weight), scale, softcap)

    equal = "expected equal on every rank, got"
    wrong = [
        (topk(), topk(3), f"teacher_logits.ids per token: {equal} 2 on rank 0, 3 on rank 1"),
        (topk(), hidden(), f"teacher_logits form: {equal} TopKLogits on rank 0, HiddenStates on rank 1"),
        (topk(), student, f"teacher_logits form: {equal} TopKLogits on rank 0, dense logits on rank 1"),
        (student, topk(), f"teacher_logits form: {equal} dense logits on rank 0, TopKLogits on rank 1"),
        (topk(), topk(dtype=torch.float64), "teacher_logits.logprobs: expected float32"),
        (topk(), topk(leading=4), "teacher_logits.logprobs: expected the student's leading shape"),
        (hidden(), hidden(size=5), f"teacher_logits.states hidden size: {equal} 4 on rank 0, 5 on rank 1"),
        (hidden(), hidden(dtype=torch.bfloat16), f"teacher_logits.states dtype: {equal}"),
        (hidden(), hidden(weight=torch.float16), f"teacher_logits.weight dtype: {equal}"),
        (hidden(), hidden(scale=2.0), f"teacher_logits.scale: {equal} 1.0 on rank 0, 2.0 on rank 1"),
        (hidden(), hidden(softcap=30.0), f"teacher_logits.softcap: {equal} None on rank 0, 30.0 on rank 1"),
        (hidden(), hidden(softcap=-1.0), "teacher_logits.softcap: expected a finite number above 0"),
        (hidden(), hidden(rows=7), "teacher_logits.weight: expected (at least )?8 rows on rank 1, .* got 7"),
    ]
    for mine, other, sentence in wrong:
        try:
            vcrd.vocab_parallel_divergence(
                student, other if rank == 1 else mine, vocab_size=16, group=dist.group.WORLD
            )
        except (TypeError, ValueError) as error:
            assert re.search(sentence, str(error)), error
            assert isinstance(error, ValueError) or rank == 1
        else:
            raise AssertionError(f"rank {rank} did not refuse: {sentence}")
    check(TopKCase((3,), 16), rank, device, [8, 8])
