"""Cases with a judge beside the float64 reference, and what each rank of a gloo world runs in test_judge.py."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import kernels_under_test  # noqa: F401  before vcrd's operators
import torch
import torch.distributed as dist
from cases import coded, decoded, expected_weights
from forms_jobs import teacher_shard
from head_jobs import HeadCase, close
from sharded_jobs import COLLECTIVES
from torch import Tensor

import vcrd
from vcrd.loss import reference
from vcrd.loss.config import LossConfig
from vcrd.loss.judge import judged_actions, settle_judge

KINDS = ("float32", "bfloat16", "float16", "codes", "own maxima", "topk", "all ids", "hidden")


@dataclass(frozen=True)
class JudgeCase:
    """A call of the loss whose judge comes in one form. The last `padding` columns are none."""

    kind: str = "float32"
    seed: int = 0
    divergence: str = "forward_kl"
    vocab: int = 61
    padding: int = 3
    tokens: tuple[int, ...] = (4, 3)
    masked: bool = True

    @property
    def _head(self) -> HeadCase:
        return HeadCase(self.tokens, self.vocab, self.padding, masked=self.masked, seed=self.seed)

    def tensors(self) -> dict[str, Tensor]:
        return self._head.tensors()

    def judge_logits(self) -> Tensor:
        """float32 [..., vocabulary]; in masked rows NaN."""
        generator = torch.Generator().manual_seed(self.seed + 99)
        logits = 2 * torch.randn(*self.tokens, self.vocab, generator=generator)
        logits[..., ::7] -= 300  # far below what most payloads can tell apart
        if self.masked:
            logits[self.tensors()["mask"] == 0] = torch.nan
        return logits

    def judge(self, columns: slice = slice(0, None)):
        """As the loss takes it, for these columns of the padded vocabulary."""
        logits = self.judge_logits()
        if self.kind in ("float32", "bfloat16"):
            whole = torch.nn.functional.pad(logits, (0, self.padding), value=torch.nan)
            return whole.to(getattr(torch, self.kind))[..., columns]
        if self.kind == "float16":  # distances, as the link sends them
            distances = logits - logits.amax(-1, keepdim=True)
            return torch.nn.functional.pad(distances, (0, self.padding), value=torch.nan).half()[..., columns]
        if self.kind == "codes":
            codes = coded(logits.nan_to_num())
            return torch.nn.functional.pad(codes, (0, self.padding))[..., columns]
        if self.kind == "own maxima":
            mine = logits.nan_to_num()[..., columns]
            top = mine.amax(-1) if mine.shape[-1] else mine.new_full(mine.shape[:-1], -torch.inf)
            width = len(range(self.vocab + self.padding)[columns])
            codes = torch.nn.functional.pad(coded(mine), (0, width - mine.shape[-1]))
            return vcrd.DenseLogits(codes, top)
        if self.kind == "hidden":
            tensors = self.tensors()
            return vcrd.HiddenStates(tensors["states"], tensors["rows"][columns], 0.9, 7.0)
        log_p = logits.nan_to_num().double().log_softmax(-1)
        logprobs, ids = log_p.topk(self.vocab if self.kind == "all ids" else 4, -1)
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        return vcrd.TopKLogits(logprobs.float(), ids, tail.float())

    def by_label(self, columns: list[slice]):
        """The reference's statistics of the judge for given labels."""
        options = {"mask": self.tensors()["mask"] if self.masked else None, "vocab_size": self.vocab}
        form, student = self.judge(), torch.zeros(*self.tokens, self.vocab)
        if isinstance(form, vcrd.TopKLogits):
            return lambda labels: reference.topk_statistics(
                student, form.logprobs, form.ids, form.log_tail, labels, **options
            )
        if self.kind == "hidden":
            logits = 0.9 * (form.states.double() @ form.weight[: self.vocab].double().T)
            logits = 7 * (logits / 7).tanh()
        elif self.kind == "own maxima":
            shards = [self.judge(part) for part in columns]
            pairs = zip(shards, columns, strict=True)
            logits = torch.cat(
                [
                    decoded(each.logits[..., : max(0, self.vocab - part.start)]) + each.row_max[..., None]
                    for each, part in pairs
                ],
                -1,
            )
        else:
            logits = decoded(form) if self.kind == "codes" else form.double()
        return lambda labels: reference.statistics(student, logits, labels, **options)


def check(
    case: JudgeCase,
    device: torch.device,
    widths: list[int] | None = None,
    rank: int = 0,
    fused: bool = False,
    with_steps: bool = False,
    **options,
) -> None:
    """Weights, loss and gradients of this rank's shard against the reference. options: of both losses."""
    tensors = case.tensors()
    widths = widths or [case.vocab + case.padding]
    starts = [sum(widths[:n]) for n in range(len(widths))]
    parts = [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]
    columns = parts[rank]
    loss, weights, of_hidden, of_logits = _truth(case, parts, with_steps, options)
    hidden = tensors["hidden"].to(device).requires_grad_()
    rows = tensors["weight"][columns].to(device)
    given = (hidden, rows) if fused else ((hidden.nan_to_num() @ rows.T).detach().requires_grad_(),)
    call = vcrd.fused_validity_calibrated_kl if fused else vcrd.validity_calibrated_kl
    out = call(
        *given,
        tensors["logits"][..., columns].to(device),
        tensors["labels"].to(device),
        judge=_moved(case.judge(columns), device),
        validity="privileged",
        divergence=case.divergence,
        vocab_size=case.vocab,
        mask=tensors["mask"].to(device) if case.masked else None,
        steps=tensors["steps"].to(device) if with_steps else None,
        group=None if len(widths) == 1 else dist.group.WORLD,
        **options,
    )
    (out.loss * tensors["upstream"][1].to(device)).sum().backward()
    close(out.weight.cpu(), weights, 1e-5, (case, "weight"))
    close(out.loss.detach().cpu(), loss, 1e-5, (case, "loss"))
    if fused:
        close(hidden.grad.cpu(), of_hidden, 2e-5, (case, "gradient of the hidden states"))
    else:
        padded = torch.nn.functional.pad(of_logits, (0, sum(widths) - case.vocab))[..., columns]
        close(given[0].grad.cpu(), padded, 2e-5, (case, "gradient of the logits"))


def _truth(case: JudgeCase, columns: list[slice], with_steps: bool, options: dict) -> tuple[Tensor, ...]:
    tensors = case.tensors()
    hidden = tensors["hidden"].double().nan_to_num().requires_grad_()
    student = hidden @ tensors["weight"][: case.vocab].double().T
    student.retain_grad()
    mask = tensors["mask"] if case.masked else None
    stats = reference.statistics(
        student, tensors["logits"][..., : case.vocab], tensors["labels"], name=case.divergence, mask=mask
    )
    validities = reference.privileged_log_validities(
        case.by_label(columns), stats["student_action"], stats["teacher_action"]
    )
    steps = tensors["steps"] if with_steps else None
    of_weights = {name: value for name, value in options.items() if name in ("weighting", "normalization")}
    weights, _ = expected_weights(
        stats, validities, proposals=[each.exp() for each in validities], steps=steps, mask=mask, **of_weights
    )
    loss = weights * stats["divergence"] + options.get("ce_weight", 0.0) * stats["cross_entropy"]
    (loss * tensors["upstream"][1].double()).sum().backward()
    return loss.detach(), weights, hidden.grad, student.grad


def _moved(judge, device: torch.device):
    if isinstance(judge, Tensor):
        return judge.to(device)
    if isinstance(judge, vcrd.DenseLogits):
        return vcrd.DenseLogits(judge.logits.to(device), judge.row_max.to(device))
    if isinstance(judge, vcrd.HiddenStates):
        return vcrd.HiddenStates(judge.states.to(device), judge.weight.to(device), judge.scale, judge.softcap)
    return teacher_shard(judge, 0, [], device)


def everything(rank: int, device: torch.device) -> None:
    """Every form over even and uneven shards, a shard of padding alone, and no tokens."""
    size = dist.get_world_size()
    for number, kind in enumerate(KINDS):
        case = JudgeCase(kind, number, ("forward_kl", "jsd")[number % 2], masked=number % 3 != 0)
        for widths in ([64 // size] * (size - 1) + [64 - 64 // size * (size - 1)], [50] + [7] * (size - 1)):
            padded = replace(case, padding=sum(widths) - case.vocab)
            if padded.padding >= 0:
                check(padded, device, widths, rank, fused=number % 2 == 1)
        check(replace(case, vocab=5, padding=8 * size - 5), device, [8] * size, rank)
    check(JudgeCase(tokens=(0, 3)), device, [32] * (size - 1) + [64 - 32 * (size - 1)], rank)
    for kind in KINDS:
        _ranks_agree(kind, rank, device)


def _ranks_agree(kind: str, rank: int, device: torch.device) -> None:
    """Bit for bit: weights never drift apart. Verdicts are log-probabilities: a sum that is wrong for both actions does
    not show in the weights."""
    size = dist.get_world_size()
    width = 61 // size + 3  # new to every rank: one that has seen its width before asks no other rank
    case = JudgeCase(kind, 5, padding=width * size - 61, masked=False)
    columns, tensors = slice(width * rank, width * (rank + 1)), case.tensors()
    student = (tensors["hidden"] @ tensors["weight"][columns].T).to(device)
    teacher, judge = tensors["logits"][..., columns].to(device), _moved(case.judge(columns), device)
    out = vcrd.validity_calibrated_kl(
        student, teacher, judge=judge, validity="privileged", vocab_size=61, group=dist.group.WORLD
    )
    copies = [torch.empty_like(out.weight) for _ in range(size)]
    dist.all_gather(copies, out.weight.contiguous())
    assert all(torch.equal(copy, copies[0]) for copy in copies)
    call = settle_judge(student, judge, None, LossConfig(vocab_size=61), dist.group.WORLD)
    verdicts = judged_actions(call, out.stats)
    actions = (out.stats.student_action.cpu(), out.stats.teacher_action.cpu())
    by_label = case.by_label([slice(width * n, width * (n + 1)) for n in range(size)])
    for found, truth in zip(verdicts, reference.privileged_log_validities(by_label, *actions), strict=True):
        torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-5, atol=2e-4, msg=kind)


def count_collectives(rank: int, device: torch.device) -> None:
    """One all-gather for the judge, none for a top k; none backward."""
    counts: Counter[str] = Counter()
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for kind, gathers in (("float32", 2), ("codes", 2), ("hidden", 2), ("topk", 1)):
        case = JudgeCase(kind, masked=False)
        tensors, columns = case.tensors(), slice(32 * rank, 32 * rank + 32)
        student = (tensors["hidden"] @ tensors["weight"][columns].T).to(device).requires_grad_()
        teacher, judge = tensors["logits"][..., columns].to(device), _moved(case.judge(columns), device)
        counts.clear()
        out = vcrd.validity_calibrated_kl(
            student, teacher, judge=judge, validity="privileged", vocab_size=61, group=dist.group.WORLD
        )
        assert dict(counts) == {all_gather: gathers}, (kind, counts)
        counts.clear()
        out.loss.sum().backward()
        assert not counts, counts


def raises_everywhere(rank: int, device: torch.device) -> None:
    student = torch.zeros(3, 8, device=device)
    teacher, good = student.clone(), student.clone()
    equal = "expected equal on every rank, got"
    wrong = [
        (None, "judge: needed by validity 'privileged', got None"),
        (torch.zeros(3, 7, device=device), "judge: expected (at least )?8 columns on rank 1"),
        (good.bfloat16(), f"judge dtype: {equal} torch.float32 on rank 0, torch.bfloat16 on rank 1"),
        (good.double(), "judge: expected float32"),
        (teacher, "judge: expected another answer than the teacher's"),
    ]
    for judge, sentence in wrong:
        try:
            vcrd.validity_calibrated_kl(
                student,
                teacher,
                judge=judge if rank == 1 else good,
                validity="privileged",
                vocab_size=16,
                group=dist.group.WORLD,
            )
        except (TypeError, ValueError) as error:
            assert re.search(sentence, str(error)), error
        else:
            raise AssertionError(f"rank {rank} did not refuse: {sentence}")
    check(JudgeCase(), device, [32, 32], rank)
