"""What each rank of a world runs in test_sharded.py; imported by the spawned processes.

The ranks talk over gloo. On CUDA they share one GPU and talk over NCCL, as users' ranks do.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import kernels_under_test  # before vcrd's operators
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Case, assert_stats, backward, call, coded, decoded, on_cpu, product_of_cases
from fork_server import context
from torch import Tensor

import vcrd
from benchmarks.gpu.ranks import ONE_GPU
from vcrd.loss import reference


def spawn(job, size: int, folder: Path, device: torch.device) -> None:
    """Runs job(rank, device) on `size` ranks of one group; any rank's failure fails the caller."""
    context()  # starts the server of forks
    arguments = (job, size, str(folder / "store"), str(device))
    mp.start_processes(_rank, arguments, nprocs=size, start_method="forkserver")


def _rank(rank: int, job, size: int, store: str, device: str) -> None:
    kernels_under_test.check()
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    backend = "gloo"
    if device.startswith("cuda"):
        os.environ |= ONE_GPU | {"NCCL_HOSTID": f"host-{rank}"}
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    try:
        job(rank, torch.device(device))
    finally:
        dist.destroy_process_group()


def shard(full: Tensor, rank: int, widths: list[int]) -> Tensor:
    """This rank's columns, a leaf of its own."""
    start = sum(widths[:rank])
    return full[..., start : start + widths[rank]].clone()


def padded(full: Tensor, width: int) -> Tensor:
    poison = torch.nan if full.is_floating_point() else 0
    return torch.nn.functional.pad(full, (0, width - full.shape[-1]), value=poison)


def sharded_call(
    case: Case,
    rank: int,
    device: torch.device,
    widths: list[int],
    teacher_widths: list[int] | None = None,
    **extra,
):
    """The loss on this rank's shards, backward done. Returns the statistics and this shard's gradient, on the CPU."""
    student, teacher, labels, mask = case.tensors(device)
    teacher_widths = teacher_widths or widths
    student = shard(padded(student[..., : case.vocab], sum(widths)), rank, widths).requires_grad_()
    teacher = shard(padded(teacher[..., : case.vocab], sum(teacher_widths)), rank, teacher_widths)
    stats = call(case, student, teacher, labels, mask, group=dist.group.WORLD, **extra)
    return backward(case, stats, student)


def widths_of(vocab: int, size: int) -> list[int]:
    """Even shards of the padded vocabulary, as Megatron cuts it (the last shards may be padding alone)."""
    width = -(-vocab // size) + 1
    return [width] * size


def check(
    case: Case,
    rank: int,
    device: torch.device,
    widths: list[int],
    teacher_widths: list[int] | None = None,
    **extra,
) -> None:
    stats, gradient = sharded_call(case, rank, device, widths, teacher_widths, **extra)
    expected, full_gradient = case.expected()
    assert_stats(stats, expected)
    full_gradient = torch.nn.functional.pad(full_gradient[..., : case.vocab], (0, sum(widths) - case.vocab))
    start = sum(widths[:rank])
    mine = full_gradient[..., start : start + widths[rank]]
    assert gradient.shape == mine.shape
    if gradient.numel():
        scale = full_gradient.abs().max().clamp(min=0.02)  # as in cases.relative_error, over all shards
        assert (gradient.double() - mine).abs().max() / scale <= 1e-5, (case, rank)
    assert (gradient[..., max(0, case.vocab - start) :] == 0).all()


def everything(rank: int, device: torch.device) -> None:
    """All comparisons that a healthy group allows, in one world."""
    size = dist.get_world_size()
    for number, case in enumerate(product_of_cases()):
        check(case, rank, device, widths_of(case.vocab, size), inplace_gradient=number % 2 == 0)
    for dtype in (torch.bfloat16, torch.float16):
        check_narrow(Case((5,), 1037, student_dtype=dtype, teacher_dtype=torch.bfloat16), rank, device)
    for divergence in ("jeffreys", "jsd"):
        codes = Case((5,), 1037, divergence=divergence, teacher_dtype=torch.uint8)
        check(codes, rank, device, widths_of(1037, size))
    uneven = Case((4,), 100, divergence="jsd")
    check(
        uneven,
        rank,
        device,
        [100 // size + (7 if r == 0 else -7 // (size - 1)) + (r == size - 1) * 30 for r in range(size)],
    )
    # The last shard's padding may differ; whole shards may be padding.
    check(Case((4,), 90), rank, device, [64] * size, [64] * (size - 1) + [128])
    check(Case((4,), 5), rank, device, [8] * size)
    check(Case((0,), 64), rank, device, [32] * size)
    own_maxima(rank, size, device)
    ranks_agree(rank, size, device)


def check_narrow(case: Case, rank: int, device: torch.device) -> None:
    widths = widths_of(case.vocab, dist.get_world_size())
    stats, gradient = sharded_call(case, rank, device, widths)
    expected, full = case.expected()
    assert_stats(stats, expected)
    start = sum(widths[:rank])
    mine = full[..., start : start + widths[rank]]
    best = (mine.to(case.student_dtype).double() - mine).abs().max()
    assert (gradient[..., : mine.shape[-1]].double() - mine).abs().max() <= best + 1e-6


def own_maxima(rank: int, size: int, device: torch.device) -> None:
    """Codes taken from each shard's own maximum, which `row_max` then tells apart."""
    for divergence in ("forward_kl", "reverse_kl", "skew_kl"):
        case = Case((6,), 64 * size, divergence=divergence, temperature=1.5)
        student, teacher, labels, _ = case.tensors()
        widths = [64] * size
        shards = [shard(teacher, r, widths) for r in range(size)]
        maxima = [part.amax(-1) for part in shards]
        values = [decoded(coded(part)) + top[:, None] for part, top in zip(shards, maxima, strict=True)]
        whole = student.double().requires_grad_()
        expected = reference.statistics(
            whole, torch.cat(values, -1), labels, name=divergence, temperature=1.5
        )
        upstream, of_cross_entropy = case.upstream()
        (expected["divergence"] * upstream + expected["cross_entropy"] * of_cross_entropy).sum().backward()
        mine = shard(student, rank, widths).to(device).requires_grad_()
        codes, top = coded(shards[rank]).to(device), maxima[rank].to(device)
        stats = call(case, mine, codes, labels.to(device), None, group=dist.group.WORLD, row_max=top)
        stats, gradient = backward(case, stats, mine)
        assert_stats(stats, expected)
        start = 64 * rank
        scale = whole.grad.abs().max()
        assert (gradient.double() - whole.grad[:, start : start + 64]).abs().max() <= 1e-5 * scale


def ranks_agree(rank: int, size: int, device: torch.device) -> None:
    """Statistics are equal bit for bit on every rank: weights and losses never drift apart."""
    stats, _ = sharded_call(Case((6,), 1000, divergence="jsd"), rank, device, widths_of(1000, size))
    for field in stats:
        copies = [torch.empty_like(field) for _ in range(size)]
        dist.all_gather(copies, field.detach().contiguous())
        assert all(torch.equal(copy, copies[0]) for copy in copies)


COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(
        ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv")
    )
    and callable(getattr(dist, name))
]


def count_collectives(rank: int, device: torch.device) -> None:
    """One all-gather forward, one small all-reduce more for mixtures, none backward; also in the first call."""
    counts: Counter[str] = Counter()
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    for divergence in ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl"):
        for _ in range(2):
            student = torch.randn(3, 16, device=device, requires_grad=True)
            labels = torch.zeros(3, dtype=torch.long, device=device)
            counts.clear()
            out = vcrd.validity_calibrated_kl(
                student,
                torch.randn(3, 16, device=device),
                labels,
                divergence=divergence,
                group=dist.group.WORLD,
                ce_weight=0.1,
            )
            mixture = {"all_reduce": 1} if divergence in ("jsd", "skew_kl", "skew_reverse_kl") else {}
            all_gather = (
                "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
            )
            assert dict(counts) == {all_gather: 1, **mixture}, counts
            counts.clear()
            out.loss.sum().backward()
            assert not counts, counts


def raises_everywhere(rank: int, device: torch.device) -> None:
    """What is wrong on one rank is one sentence on all, at once; and the group works afterwards."""
    good = dict(student_logits=torch.zeros(3, 8), teacher_logits=torch.zeros(3, 8), vocab_size=16)
    wrong = [
        (dict(student_logits=torch.zeros(3, 8).double()), "student_logits: expected float32"),
        (
            dict(student_logits=torch.zeros(4, 8), teacher_logits=torch.zeros(4, 8)),
            "student_logits leading shape",
        ),
        (dict(teacher_logits=torch.zeros(3, 8).bfloat16()), "teacher_logits dtype"),
        (dict(teacher_logits=torch.zeros(3, 7)), "teacher_logits: expected (at least )?8 columns on rank 1"),
        (dict(vocab_size=15), "vocab_size: expected equal on every rank, got 16 on rank 0, 15 on rank 1"),
        (dict(temperature=2.0), "temperature: expected equal on every rank"),
        (dict(divergence="jsd"), "divergence: expected equal on every rank"),
        (dict(divergence="kl"), "divergence: expected one of"),
        (dict(labels=torch.zeros(3, dtype=torch.long)), "labels given: expected equal on every rank"),
        (dict(row_max=torch.zeros(3)), "teacher_logits.row_max given: expected equal on every rank"),
        (dict(sharpnes=2.0), "sharpnes: expected an argument of this function or a field of LossConfig"),
    ]
    for change, sentence in wrong:
        arguments = {**good, **(change if rank == 1 else {})}
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        teacher = vcrd.DenseLogits(arguments.pop("teacher_logits"), arguments.pop("row_max", None))
        try:
            vcrd.vocab_parallel_divergence(
                arguments.pop("student_logits"),
                teacher,
                group=dist.group.WORLD,
                **arguments,
            )
        except (TypeError, ValueError) as error:
            assert re.search(sentence, str(error)), error
            assert isinstance(error, ValueError) or rank == 1
        else:
            raise AssertionError(f"rank {rank} did not refuse {change}")
    check(Case((3,), 16), rank, device, [8, 8])


def misaligned_padding(rank: int, device: torch.device) -> None:
    """Padding of an inner shard would shift the teacher's columns: refused, not computed wrongly."""
    try:
        vcrd.vocab_parallel_divergence(
            torch.zeros(2, 8, device=device),
            torch.zeros(2, 10, device=device),
            vocab_size=16,
            group=dist.group.WORLD,
        )
    except ValueError as error:
        assert "teacher_logits: expected 8 columns on rank 0" in str(error)
    else:
        raise AssertionError("accepted")


def mean_over_ranks(rank: int, device: torch.device) -> None:
    """Normalisation `mean` over the ranks that share a loss: exact for unequal token counts."""
    student, teacher, labels, mask = Case((2, 9), 50, with_mask=True, scale=1.0).tensors(device)
    size, mine = dist.get_world_size(), slice(0, 4) if rank == 0 else slice(4, 9)
    if rank > 1:
        mine = slice(9, 9)
    local = vcrd.vocab_parallel_divergence(
        student[:, mine], teacher[:, mine], labels[:, mine], mask=mask[:, mine]
    )
    weight, _ = vcrd.validity_weights(
        local, mask=mask[:, mine], normalization="mean", weight_group=dist.group.WORLD
    )
    whole = vcrd.vocab_parallel_divergence(student, teacher, labels, mask=mask)
    expected, _ = vcrd.validity_weights(whole, mask=mask, normalization="mean")
    torch.testing.assert_close(weight, expected[:, mine])
    kept = expected[mask != 0]
    assert size > 1 and abs(float(kept.mean()) - 1) < 1e-6


def compiled(rank: int, device: torch.device) -> None:
    """torch.compile around a sharded loss gives the eager loss and gradient."""

    def loss(student, teacher, labels):
        out = vcrd.validity_calibrated_kl(
            student * 1.5, teacher, labels, divergence="jsd", group=dist.group.WORLD, ce_weight=0.1
        )
        return out.loss.sum()

    student, teacher, labels, _ = Case((5,), 40).tensors(device)
    student, teacher = shard(student, rank, [20, 20]), shard(teacher, rank, [20, 20])
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    eager, graph = loss(a, teacher, labels), torch.compile(loss, backend="aot_eager")(b, teacher, labels)
    torch.testing.assert_close(graph, eager)
    eager.backward()
    graph.backward()
    torch.testing.assert_close(b.grad, a.grad)


def independent_groups(rank: int, device: torch.device) -> None:
    """Two tensor-parallel groups in one world, as with data parallelism: each agrees and gathers by itself."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = replace(Case((3,), 40), seed=rank // 2)
    student, teacher, labels, _ = case.tensors(device)
    half, other = shard(student, rank % 2, [20, 20]), shard(teacher, rank % 2, [20, 20])
    stats = call(case, half, other, labels, None, group=groups[rank // 2])
    assert_stats(on_cpu(stats), case.expected()[0])
