"""Cases whose teacher is no dense tensor: its top k, or its hidden states. Run and compared as those of cases.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import Case, decoded
from torch import Tensor

import vcrd
from vcrd.loss import reference

NEVER = 10**12  # an id that no vocabulary has


@dataclass(frozen=True)
class TopKCase(Case):
    """The k most probable tokens of the Case's teacher, in random order; every other label is one of them."""

    k: int = 8
    log_tail: float | None = None  # instead of the teacher's own, the ids sharing the rest

    def tensors(self, device="cpu") -> tuple[Tensor, vcrd.TopKLogits, Tensor, Tensor | None]:
        student, teacher, labels, mask = super().tensors()
        generator = torch.Generator("cpu").manual_seed(self.seed + 2)
        logprobs, ids = teacher[..., : self.vocab].nan_to_num().double().log_softmax(-1).topk(self.k, -1)
        order = torch.randperm(self.k, generator=generator, device="cpu")
        logprobs, ids = logprobs[..., order], ids[..., order]
        log_tail = self._tail(teacher, ids)
        if self.log_tail is not None:
            log_tail = torch.full_like(log_tail, self.log_tail)
            logprobs = logprobs.log_softmax(-1) + torch.log1p(-log_tail.exp())[..., None]
        logprobs, log_tail = logprobs.float(), log_tail.float()
        labels = torch.where(
            torch.arange(len(labels)).reshape(-1, *[1] * (labels.dim() - 1)) % 2 == 0, ids[..., 0], labels
        )
        if mask is not None:
            logprobs[mask == 0], log_tail[mask == 0] = torch.nan, torch.nan
            ids[mask == 0] = torch.tensor([-1, NEVER, -NEVER])[torch.arange(self.k) % 3]
        form = vcrd.TopKLogits(logprobs.to(device), ids.to(device), log_tail.to(device))
        return student.to(device), form, labels.to(device), None if mask is None else mask.to(device)

    def _tail(self, teacher: Tensor, ids: Tensor) -> Tensor:
        log_p = teacher[..., : self.vocab].nan_to_num().double().log_softmax(-1)
        return log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)

    def statistics(self, student: Tensor, teacher: vcrd.TopKLogits, labels, mask) -> dict[str, Tensor]:
        return reference.topk_statistics(
            student,
            *(teacher.logprobs, teacher.ids, teacher.log_tail, labels),
            name=self.divergence,
            vocab_size=self.vocab,
            mask=mask,
            **self.settings,
        )

    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        return differentiated(self)


@dataclass(frozen=True)
class HiddenCase(Case):
    """The states and the output layer of a teacher; `teacher_dtype` is that of both. Padding rows hold NaN."""

    hidden: int = 24
    weight_dtype: torch.dtype | None = None  # where it is not the states'
    multiplier: float = 1.0
    softcap: float | None = None

    def tensors(self, device="cpu") -> tuple[Tensor, vcrd.HiddenStates, Tensor, Tensor | None]:
        student, _, labels, mask = replace(self, teacher_dtype=torch.float32).dense().tensors()
        generator = torch.Generator("cpu").manual_seed(self.seed + 3)
        states = torch.randn(*self.tokens, self.hidden, generator=generator) * self.scale
        weight = torch.randn(self.vocab + self.teacher_padding, self.hidden, generator=generator)
        weight = weight / self.hidden**0.5
        weight[self.vocab :] = torch.nan
        if mask is not None:
            states[mask == 0] = torch.nan
        form = vcrd.HiddenStates(
            states.to(device, self.teacher_dtype),
            weight.to(device, self.weight_dtype or self.teacher_dtype),
            self.multiplier,
            self.softcap,
        )
        return student.to(device), form, labels.to(device), None if mask is None else mask.to(device)

    def dense(self) -> Case:
        return Case(**{name: getattr(self, name) for name in Case.__dataclass_fields__})

    def teacher_logits(self, teacher: vcrd.HiddenStates) -> Tensor:
        """In float64, by themselves."""
        logits = self.multiplier * (teacher.states.double() @ teacher.weight.double().T)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def statistics(self, student: Tensor, teacher: vcrd.HiddenStates, labels, mask) -> dict[str, Tensor]:
        return reference.statistics(
            *(student, self.teacher_logits(teacher), labels),
            name=self.divergence,
            temperature=self.temperature,
            vocab_size=self.vocab,
            mask=mask,
            **self.settings,
        )

    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        return differentiated(self)


@dataclass(frozen=True)
class MixedCase(Case):
    """The mixture of the Case's teacher, with row maxima, of codes, and of hidden states."""

    weights: tuple[float, ...] = (1.0, 2.5, 0.5)

    def tensors(self, device="cpu") -> tuple[Tensor, vcrd.MixedLogits, Tensor, Tensor | None]:
        student, teacher, labels, mask = super().tensors()
        top = teacher[..., : self.vocab].float().amax(-1) if self.vocab else student.new_zeros(self.tokens)
        dense = vcrd.DenseLogits(
            (teacher.float() - top[..., None]).to(teacher.dtype).to(device), top.to(device)
        )
        plain = Case(**{name: getattr(self, name) for name in Case.__dataclass_fields__})
        plain = replace(plain, with_mask=False)
        padding = self.teacher_padding and self.teacher_padding + 4
        codes = replace(
            plain, seed=self.seed + 7, teacher_dtype=torch.uint8, teacher_padding=padding
        ).tensors()[1]
        hidden = HiddenCase(**{**vars(plain), "seed": self.seed + 9, "softcap": 9.0}).tensors()[1]
        if mask is not None:
            codes[mask == 0] = 255
            hidden.states[mask == 0] = torch.nan
        hidden = vcrd.HiddenStates(hidden.states.to(device), hidden.weight.to(device), 1.0, 9.0)
        form = vcrd.MixedLogits((dense, vcrd.DenseLogits(codes.to(device)), hidden), self.weights)
        return student.to(device), form, labels.to(device), None if mask is None else mask.to(device)

    def statistics(self, student: Tensor, teacher: vcrd.MixedLogits, labels, mask) -> dict[str, Tensor]:
        dense, codes, hidden = teacher.teachers
        logits = 9 * (hidden.states.double() @ hidden.weight.double().T / 9).tanh()
        each = [dense.logits, decoded(codes.logits), logits]
        mixed = reference.mixed_logits([one[..., : self.vocab].nan_to_num() for one in each], self.weights)
        return reference.statistics(
            *(student, mixed, labels),
            name=self.divergence,
            temperature=self.temperature,
            vocab_size=self.vocab,
            mask=mask,
            **self.settings,
        )

    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        return differentiated(self)


def differentiated(case: TopKCase | HiddenCase | MixedCase) -> tuple[dict[str, Tensor], Tensor]:
    """The reference's statistics and the gradient of the student's logits, for the case's upstream gradients."""
    student, teacher, labels, mask = case.tensors()
    student = student.double().requires_grad_()
    stats = case.statistics(student, teacher, labels, mask)
    divergence, cross_entropy = case.upstream()
    (stats["divergence"] * divergence + stats["cross_entropy"] * cross_entropy).sum().backward()
    return stats, student.grad


def moved(form: vcrd.TopKLogits, device) -> vcrd.TopKLogits:
    return vcrd.TopKLogits(*(tensor.to(device) for tensor in (form.logprobs, form.ids, form.log_tail)))
