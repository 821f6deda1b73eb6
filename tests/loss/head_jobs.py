"""The fused head beside the float64 reference: cases, and what each rank of a gloo world runs in test_head.py."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import kernels_under_test  # noqa: F401  before vcrd's operators
import torch
import torch.distributed as dist
from cases import coded, decoded, expected_weights
from torch import Tensor

import vcrd
from vcrd.loss import reference
from vcrd.loss.config import DIVERGENCES

SIZE, SCALE = 12, 1.3


@dataclass(frozen=True)
class HeadCase:
    """One call on the whole vocabulary, of which the last `padding` columns are none. teacher: the form it comes in."""

    tokens: tuple[int, ...] = (4, 3)
    vocab: int = 61
    padding: int = 3
    teacher: str = "dense"
    divergence: str = "forward_kl"
    temperature: float = 1.0
    softcap: float | None = None
    masked: bool = False
    fractional: bool = False  # whether the mask weighs some tokens less than others
    uneven: bool = False  # the loss's upstream gradient: its own for each token, or one for all
    and_stats: bool = False  # whether divergence and cross-entropy have one as well
    dtype: torch.dtype = torch.float32
    ce_weight: float = 0.0
    weighting: str = "sigmoid"
    normalization: str = "none"
    validity: str = "label"
    with_steps: bool = False
    seed: int = 0
    extra: dict = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        width = self.vocab + self.padding
        found = {
            "hidden": (2 * draw(*self.tokens, SIZE)).to(self.dtype),
            "weight": (draw(width, SIZE) / SIZE**0.5).to(self.dtype),
            "logits": 2 * draw(*self.tokens, width),
            "states": 2 * draw(*self.tokens, SIZE),
            "rows": draw(width, SIZE) / SIZE**0.5,
            "labels": torch.randint(-1, self.vocab, self.tokens, generator=generator),
            "mask": (torch.rand(self.tokens, generator=generator) < 0.6).float(),
            "steps": torch.randint(-1, 3, self.tokens, generator=generator),
            "upstream": torch.randn(3, *self.tokens, generator=generator),
        }
        found["weight"][self.vocab :] = torch.nan
        if self.fractional:
            found["mask"] *= torch.rand(self.tokens, generator=generator).clamp(min=0.1)
        if not self.uneven:
            found["upstream"][0] = 0.7
        if self.masked:
            found["upstream"][0] *= found["mask"]
            for name in ("hidden", "logits", "states"):
                found[name][found["mask"] == 0] = torch.nan
        return found

    def arguments(self, tensors: dict[str, Tensor]) -> dict:
        return {
            "divergence": self.divergence,
            "temperature": self.temperature,
            "vocab_size": self.vocab,
            "mask": tensors["mask"] if self.masked else None,
            "ce_weight": self.ce_weight,
            "weighting": self.weighting,
            "normalization": self.normalization,
            "validity": self.validity,
            "steps": tensors["steps"] if self.with_steps else None,
            "scale": SCALE,
            "softcap": self.softcap,
            **self.extra,
        }

    def form(self, tensors: dict[str, Tensor], columns: slice):
        """The teacher as the loss takes it, for these columns of the vocabulary."""
        logits = tensors["logits"].nan_to_num()
        if self.teacher == "dense":
            return tensors["logits"][..., columns]
        if self.teacher == "codes":
            codes = coded(logits[..., : self.vocab])
            return torch.nn.functional.pad(codes, (0, self.padding))[..., columns]
        hidden = vcrd.HiddenStates(tensors["states"], tensors["rows"][columns], 0.9, 7.0)
        if self.teacher == "hidden":
            return hidden
        if self.teacher == "mixed":
            return vcrd.MixedLogits((vcrd.DenseLogits(tensors["logits"][..., columns]), hidden), (1.0, 2.0))
        log_p = logits[..., : self.vocab].double().log_softmax(-1)
        logprobs, ids = log_p.topk(5, -1)
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        return vcrd.TopKLogits(logprobs.float(), ids, tail.float())

    def truth(self) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Loss, weight, statistics and both gradients in float64, by the reference."""
        tensors = self.tensors()
        hidden = tensors["hidden"].double().nan_to_num().requires_grad_()
        weight = tensors["weight"][: self.vocab].double().requires_grad_()
        student = SCALE * (hidden @ weight.T)
        if self.softcap is not None:
            student = self.softcap * (student / self.softcap).tanh()
        form = self.form(tensors, slice(0, self.vocab))
        options = {"name": self.divergence, "mask": tensors["mask"] if self.masked else None}
        if isinstance(form, vcrd.TopKLogits):
            stats = reference.topk_statistics(
                *(student, form.logprobs, form.ids, form.log_tail, tensors["labels"]), **options
            )
        else:
            by_states = 0.9 * (tensors["states"].double() @ tensors["rows"][: self.vocab].double().T)
            by_states = 7 * (by_states / 7).tanh()
            if self.teacher == "hidden":
                teacher = by_states
            elif self.teacher == "mixed":
                teacher = reference.mixed_logits(
                    [tensors["logits"][..., : self.vocab], by_states], [1.0, 2.0]
                )
            else:
                teacher = decoded(form) if self.teacher == "codes" else form
            stats = reference.statistics(
                student, teacher, tensors["labels"], temperature=self.temperature, **options
            )
        weights, _ = expected_weights(
            stats,
            reference.log_validities(stats, self.validity),
            self.weighting,
            steps=tensors["steps"] if self.with_steps else None,
            mask=options["mask"],
            normalization=self.normalization,
        )
        loss = weights * stats["divergence"] + self.ce_weight * stats["cross_entropy"]
        self.total(loss, stats["divergence"], stats["cross_entropy"], tensors).backward()
        return loss.detach(), weights, stats, hidden.grad, weight.grad

    def total(self, loss, divergence, cross_entropy, tensors) -> Tensor:
        of_loss, of_divergence, of_cross_entropy = tensors["upstream"].to(loss.dtype)
        total = (loss * of_loss).sum()
        if self.and_stats:
            total = total + (divergence * of_divergence + cross_entropy * of_cross_entropy).sum()
        return total


def close(actual: Tensor, expected: Tensor, tolerance: float, what: object) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=0.02)
        assert error <= tolerance, (what, float(error))


def check(case: HeadCase, rank: int = 0, size: int = 1, group=None, sequence_parallel: bool = False) -> None:
    """Values and gradients of this rank's shards against the reference."""
    tensors = case.tensors()
    width = (case.vocab + case.padding) // size
    columns = slice(rank * width, (rank + 1) * width)
    hidden, weight = tensors["hidden"], tensors["weight"][columns].clone().requires_grad_()
    part = slice(None)
    if sequence_parallel:
        length = len(hidden) // size
        part = slice(rank * length, (rank + 1) * length)
    hidden = hidden[part].clone().requires_grad_()
    form = case.form(tensors, columns)
    out = vcrd.fused_validity_calibrated_kl(
        *(hidden, weight, form, tensors["labels"]),
        group=group,
        sequence_parallel=sequence_parallel,
        **case.arguments(tensors),
    )
    case.total(out.loss, out.stats.divergence, out.stats.cross_entropy, tensors).backward()
    loss, weights, stats, of_hidden, of_weight = case.truth()
    of_weight = torch.nn.functional.pad(of_weight, (0, 0, 0, case.padding))[columns]
    narrow = case.dtype != torch.float32
    close(out.loss.detach(), loss, 1e-5, (case, "loss"))
    close(out.weight, weights, 1e-5, (case, "weight"))
    close(out.stats.student_entropy, stats["student_entropy"].detach(), 1e-5, (case, "entropy"))
    assert torch.equal(out.stats.student_action, stats["student_action"])
    # A gradient is rounded to its tensor's dtype, and with several ranks each of their parts is.
    close(hidden.grad, of_hidden[part], 1e-2 if narrow else 1e-5, (case, "gradient of the hidden states"))
    close(weight.grad, of_weight, 4e-3 if narrow else 1e-5, (case, "gradient of the weight"))
    assert (weight.grad[max(0, case.vocab - columns.start) :] == 0).all()
    assert hidden.grad.dtype == weight.grad.dtype == case.dtype


def cases() -> list[HeadCase]:
    """Every divergence with every kind of teacher; all else in turn."""
    found = []
    for divergence in DIVERGENCES:
        for teacher in ("dense", "codes", "topk", "hidden", "mixed"):
            n = len(found)
            found.append(
                HeadCase(
                    teacher=teacher,
                    divergence=divergence,
                    temperature=1.0 if teacher == "topk" or n % 2 else 1.7,
                    softcap=(None, 4.0)[n % 2],
                    masked=n % 3 != 1,
                    uneven=n % 4 == 3,
                    and_stats=n % 5 == 4,
                    ce_weight=(0.0, 0.4)[n // 2 % 2],
                    weighting="gap" if n % 6 == 3 else "sigmoid",
                    normalization=("none", "mean", "mass")[n // 3 % 3],
                    validity=("label", "margin", "confidence")[n % 3],
                    with_steps=n % 7 == 6,
                    seed=n,
                    # A token, some tokens, and all of them at a time.
                    extra={
                        "chunk_bytes": (1, 4 * 64 * 5, 1 << 20)[n % 3],
                        "upstream": "uneven" if n % 8 == 5 else "look",
                    },
                )
            )
    return [*found, HeadCase(dtype=torch.bfloat16), HeadCase(dtype=torch.bfloat16, uneven=True, masked=True)]


def everything(rank: int, device: torch.device) -> None:
    size, group = dist.get_world_size(), dist.group.WORLD
    for number, case in enumerate(cases()):
        check(case, rank, size, group, sequence_parallel=number % 2 == 1)
    check(HeadCase(vocab=13, padding=51), rank, size, group)  # whole shards of padding
    check(HeadCase(tokens=(0, 3)), rank, size, group)


def count_collectives(rank: int, device: torch.device) -> None:
    """As the docstring says: per chunk forward, and one for the hidden states backward."""
    counts: Counter[str] = Counter()
    for name in (
        *("all_gather_into_tensor", "all_gather_single", "all_reduce", "reduce_scatter_tensor"),
        *("reduce_scatter_single", "all_gather", "broadcast"),
    ):
        original = getattr(dist, name, None)
        if original is None:
            continue

        def counted(*args, name=name, original=original, **kwargs):
            counts[name.replace("_single", "").replace("_into_tensor", "").replace("_tensor", "")] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    for divergence, reduced in (("forward_kl", 0), ("jsd", 3)):
        for sequence_parallel in (False, True):
            for uneven in (False, True):
                case = HeadCase(divergence=divergence, uneven=uneven, extra={"chunk_bytes": 4 * 32 * 4})
                tensors = case.tensors()
                width, half = 64 // 2, slice(2 * rank, 2 * rank + 2) if sequence_parallel else slice(None)
                columns = slice(rank * width, (rank + 1) * width)
                counts.clear()
                out = vcrd.fused_validity_calibrated_kl(
                    tensors["hidden"][half].clone().requires_grad_(),
                    tensors["weight"][columns].clone().requires_grad_(),
                    *(tensors["logits"][..., columns], tensors["labels"]),
                    group=dist.group.WORLD,
                    sequence_parallel=sequence_parallel,
                    **case.arguments(tensors),
                )
                expected = Counter({"all_gather": 3 + sequence_parallel, "all_reduce": reduced})
                assert counts == +expected, counts  # twelve tokens, four at a time
                counts.clear()
                case.total(*(out.loss, None, None), tensors).backward()
                assert counts == Counter(["reduce_scatter" if sequence_parallel else "all_reduce"]), counts


def raises_everywhere(rank: int, device: torch.device) -> None:
    """What is wrong on one rank is one sentence on all, at once; and the group works afterwards."""
    good = HeadCase().tensors()
    given = {"hidden": good["hidden"], "weight": good["weight"][:32]}
    wrong = [
        ({"hidden": good["hidden"].double()}, {}, "hidden: expected float32, bfloat16 or float16"),
        ({"weight": good["weight"][:32, 1:]}, {}, "weight: expected shape .vocabulary shard, 12."),
        ({}, {"scale": 0}, "scale: expected a finite number above 0, got 0"),
        ({}, {"sharpness": -1}, "sharpness: expected a finite number"),
        ({}, {"softcap": 2.0}, "softcap: expected equal on every rank, got None on rank 0, 2.0 on rank 1"),
        ({}, {"chunk_bytes": 64}, "chunk_bytes: expected equal on every rank"),
        ({"hidden": good["hidden"].bfloat16()}, {}, "hidden dtype: expected equal on every rank"),
    ]
    for tensors, arguments, sentence in wrong:
        tensors, arguments = (tensors, arguments) if rank == 1 else ({}, {})
        try:
            vcrd.fused_validity_calibrated_kl(
                *{**given, **tensors}.values(),
                *(good["logits"][..., :32], good["labels"]),
                **{"group": dist.group.WORLD, **arguments},
            )
        except (TypeError, ValueError) as error:
            assert re.search(sentence, str(error)), error
        else:
            raise AssertionError(f"rank {rank} did not refuse: {sentence}")
    check(HeadCase(), rank, 2, dist.group.WORLD)
