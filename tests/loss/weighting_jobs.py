"""The weighting "gap" and the normalizations over ranks: what each rank of a gloo world runs in test_weighting.py."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import kernels_under_test  # noqa: F401  before vcrd's operators
import torch
import torch.distributed as dist
from cases import Case, expected_weights
from context_jobs import parts
from sharded_jobs import COLLECTIVES, shard
from torch import Tensor

import vcrd
from vcrd.link.plan import context_rows
from vcrd.loss import reference

ROWS, SEQUENCE, VOCAB = 4, 12, 40
STEPS = torch.randint(-1, 4, (ROWS, SEQUENCE), generator=torch.Generator().manual_seed(3))
STEPS = torch.where(STEPS >= 0, STEPS + 4 * torch.arange(ROWS)[:, None], -1)


@dataclass(frozen=True)
class Weighing:
    """A configuration, and what goes with it. scored: validity "scores" in the place of "label"."""

    weighting: str = "gap"
    normalization: str = "none"
    divergence: str = "jsd"
    ce_weight: float = 0.0
    scored: bool = False
    with_steps: bool = False
    map: dict[str, float] = field(default_factory=dict)

    def config(self, **more) -> vcrd.LossConfig:
        return vcrd.LossConfig(
            weighting=self.weighting,
            normalization=self.normalization,
            divergence=self.divergence,
            ce_weight=self.ce_weight,
            validity="scores" if self.scored else "label",
            **self.map,
            **more,
        )


WEIGHINGS = (
    Weighing(),
    Weighing(normalization="mass", scored=True),
    Weighing(normalization="mean", divergence="forward_kl", ce_weight=0.3),
    Weighing("sigmoid", "mass", "reverse_kl"),
    Weighing("sigmoid", "mean", ce_weight=0.3, with_steps=True),
    Weighing(normalization="mass", with_steps=True, map={"sharpness": 2.0, "floor": 0.3, "ceiling": 1.7}),
    Weighing(scored=True, with_steps=True),
)


def tensors(seed: int = 5) -> dict[str, Tensor]:
    """A global micro-batch [rows, sequence]: of the last row no token counts."""
    student, teacher, labels, mask = Case(
        (ROWS, SEQUENCE), VOCAB, with_mask=True, scale=1.5, seed=seed
    ).tensors()
    mask[-1] = 0
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, ROWS, SEQUENCE, generator=generator)
    scores *= torch.rand(2, ROWS, SEQUENCE, generator=generator) < 0.6  # rejected proposals
    return {"student": student, "teacher": teacher, "labels": labels, "mask": mask, "scores": scores}


def truth(weighing: Weighing, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and losses [b, s] of all tokens at once, and the gradient of the sum of the losses [b, s, v]; float64."""
    student = given["student"].double().nan_to_num().requires_grad_()
    stats = reference.statistics(
        student, given["teacher"], given["labels"], name=weighing.divergence, mask=given["mask"]
    )
    scores = given["scores"].double()
    validities = tuple(scores.log()) if weighing.scored else reference.log_validities(stats, "label")
    weights, _ = expected_weights(
        stats,
        validities,
        weighing.weighting,
        scores if weighing.scored else None,
        mask=given["mask"],
        steps=STEPS if weighing.with_steps else None,
        normalization=weighing.normalization,
        **weighing.map,
    )
    loss = weights * stats["divergence"] + weighing.ce_weight * stats["cross_entropy"]
    loss.sum().backward()
    return weights, loss.detach(), student.grad


def close(found: Tensor, expected: Tensor, what: object) -> None:
    scale = expected.abs().max().clamp(min=0.02) if expected.numel() else 1.0
    assert found.shape == expected.shape, what
    if found.numel():
        assert (found.detach().cpu().double() - expected).abs().max() / scale <= 1e-5, what


def check(
    weighing: Weighing,
    device: torch.device | str = "cpu",
    fused: bool = False,
    rows: slice = slice(None),
    columns: slice | Tensor = slice(None),
    tensor: tuple[int, int] = (0, 1),
    tensor_group: dist.ProcessGroup | None = None,
    **groups,
) -> vcrd.CalibratedLoss:
    """Weight, loss and gradient of this rank's rows and columns [b, s] of the global micro-batch. tensor: its rank of
    the tensor-parallel ones, and their number."""
    given = tensors()
    weights, losses, gradient = truth(weighing, given)
    widths = [VOCAB // tensor[1]] * tensor[1]

    def own(full: Tensor) -> Tensor:
        return full[rows][:, columns].transpose(0, 1)

    def sharded(full: Tensor) -> Tensor:
        return own(shard(full, tensor[0], widths))

    arguments = dict(config=weighing.config(**groups), mask=own(given["mask"]).to(device), group=tensor_group)
    if weighing.with_steps:
        arguments["steps"] = own(STEPS).to(device)
    if weighing.scored:
        names = ("student_validity", "teacher_validity")
        arguments |= {name: own(each).to(device) for name, each in zip(names, given["scores"], strict=True)}
    rest = (sharded(given["teacher"]).to(device), own(given["labels"]).to(device))
    if fused:  # the output layer is the identity, so the gradient of the hidden states is that of the logits
        leaf = own(given["student"]).contiguous().to(device).requires_grad_()
        layer = shard(torch.eye(VOCAB, device=device), tensor[0], widths).T.contiguous()
        out = vcrd.fused_validity_calibrated_kl(leaf, layer, *rest, chunk_bytes=4 * VOCAB * 7, **arguments)
    else:
        leaf = sharded(given["student"]).contiguous().to(device).requires_grad_()
        out = vcrd.validity_calibrated_kl(leaf, *rest, **arguments)
    out.loss.sum().backward()
    close(out.weight, own(weights), (weighing, "weight"))
    close(out.loss, own(losses), (weighing, "loss"))
    close(leaf.grad, own(gradient) if fused else sharded(gradient), (weighing, "gradient"))
    return out


def of_data_ranks(rank: int, device: torch.device) -> None:
    """The first rank has most rows, the second one in which no token counts, and the third no token at all."""
    rows = (slice(0, ROWS - 1), slice(ROWS - 1, ROWS), slice(0, 0))[rank]
    for weighing in WEIGHINGS:
        for fused in (False, True):
            check(weighing, device, fused, rows, weight_group=dist.group.WORLD)


def of_context_ranks(rank: int, device: torch.device) -> None:
    """Tensor 2 x context 2, in Megatron's order of ranks and of positions: steps span context ranks."""
    tensor_group, context_group, tensor_rank, context_rank = parts(rank, 2)
    spans = context_rows(SEQUENCE, context_rank, 2)
    columns = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    for weighing in WEIGHINGS:
        for fused in (False, True):
            out = check(
                weighing,
                device,
                fused,
                columns=columns,
                tensor=(tensor_rank, 2),
                tensor_group=tensor_group,
                weight_group=context_group,
                steps_group=context_group if weighing.with_steps else None,
            )
            # The same to the last bit on both tensor ranks.
            pair = [torch.empty_like(out.weight.contiguous()) for _ in range(2)]
            dist.all_gather(pair, out.weight.contiguous(), group=tensor_group)
            assert torch.equal(*pair), (weighing, fused)


def calls(rank: int, device: torch.device) -> None:
    """How many collectives there are, and what differs between ranks in one sentence on both."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, original in originals.items():

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    given = {name: tensor.to(device) for name, tensor in tensors(rank).items()}
    logits, rest = given["student"], (given["teacher"], given["labels"])
    arguments = dict(mask=given["mask"], weight_group=dist.group.WORLD)
    for options, reduced in (
        ({}, 0),
        ({"weighting": "gap"}, 1),
        ({"normalization": "mean"}, 1),
        ({"weighting": "gap", "normalization": "mass"}, 2),
    ):
        for fused in (False, True):
            head = (torch.eye(VOCAB, device=device),) if fused else ()
            loss = vcrd.fused_validity_calibrated_kl if fused else vcrd.validity_calibrated_kl
            more = {"chunk_bytes": 4 * VOCAB * 7} if fused else {}
            counts.clear()
            out = loss(logits.clone().requires_grad_(), *head, *rest, **arguments, **options, **more)
            out.loss.sum().backward()
            assert counts == +Counter({"all_reduce": reduced}), (options, fused, counts)
    for name, original in originals.items():
        setattr(dist, name, original)

    for options, sentence in (
        (
            {"sharpness": 5.0 + rank},
            "sharpness: expected equal on every rank, got 5.0 on rank 0, 6.0 on rank 1",
        ),
        (
            {"sharpness": 7.0, "normalization": ("mean", "mass")[rank]},
            "normalization: expected equal on every",
        ),
    ):
        try:
            vcrd.validity_calibrated_kl(logits, *rest, **arguments, weighting="gap", **options)
        except ValueError as error:
            assert re.search(sentence, str(error)), error
        else:
            raise AssertionError(f"accepted {options}")


def compiled(rank: int, device: torch.device) -> None:
    given = {name: tensor.to(device) for name, tensor in tensors(rank).items()}
    rest = (given["teacher"], given["labels"])
    config = vcrd.LossConfig(weighting="gap", normalization="mass", weight_group=dist.group.WORLD)

    def total(leaf: Tensor) -> Tensor:
        return vcrd.validity_calibrated_kl(1.5 * leaf, *rest, mask=given["mask"], config=config).loss.sum()

    a, b = (given["student"].nan_to_num().requires_grad_() for _ in range(2))
    eager, compiled = total(a), torch.compile(total, backend="aot_eager")(b)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(b.grad, a.grad)
