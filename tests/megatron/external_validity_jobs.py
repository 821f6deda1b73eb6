"""What processes do in the tests of validity from outside, and the same computed in one process."""

from __future__ import annotations

from types import SimpleNamespace

import jobs
import torch
import torch.distributed as dist
from torch import Tensor

MICRO_BATCHES = 2
# What the settings ask for, and whether a verifier judges.
MODES = {
    "scores": ({"validity": "scores"}, False),
    "label": ({"validity": "label"}, False),
    "judged": ({"fused_head": "on"}, True),
    # Of so few tokens known, the action must still be the teacher's own.
    "judged from the best token": ({"payload": "topk", "top_k": 1}, True),
}


def fields(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Random steps, numbered in each sample by themselves, and scores."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(shape, generator=generator) * 0.95 + 0.05

    return {
        "vcrd_steps": torch.randint(-1, 3, shape, generator=generator),
        "vcrd_student_validity": draw(),
        "vcrd_teacher_validity": draw(),
    }


def data(with_fields: bool) -> list[dict[str, Tensor]]:
    found = []
    for number, batch in enumerate(jobs.batches(MICRO_BATCHES)):
        extra = fields(tuple(batch["tokens"].shape), 50 + number) if with_fields else {}
        found.append({**batch, **extra})
    return found


def verdict(tokens: Tensor, action: Tensor) -> Tensor:
    """A validity in (0, 1] that tells tokens and actions apart."""
    return ((3 * tokens + 7 * action) % 11 + 1) / 11


class Verifier:
    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, tokens: Tensor, student_action: Tensor, teacher_action: Tensor, batch: dict) -> tuple:
        self.calls.append({"tokens": tokens, "action": student_action, "mask": batch["loss_mask"]})
        answers = []
        for action in (student_action, teacher_action):
            # What is said where nothing is to be judged must not matter.
            answers.append(torch.where(action >= 0, verdict(tokens, action), torch.nan))
        return tuple(answers)


def student_job(settings) -> SimpleNamespace | None:
    """One step of each mode through Megatron's schedule; only tensor rank 0 has the fields."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    part = jobs.model(jobs.STUDENT, seed=1).train()
    part.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(part.config, DistributedDataParallelConfig(), part)
    results = {}
    for name, (changes, judged) in MODES.items():
        wrapped.zero_grad_buffer()
        verifier = Verifier() if judged else None
        losses: list[Tensor] = []
        keys: list[set[str]] = []
        observed: list = []
        plain = jobs.plain_forward_step(losses)

        def forward_step(iterator, model, plain=plain, keys=keys):
            def seen():
                for batch in iterator:
                    keys.append(set(batch))
                    yield batch

            return plain(seen(), model)

        plug = distill(forward_step, settings.replaced(name=name, **changes), verifier=verifier)
        with plug.measure(observed.append) as report:
            get_forward_backward_func()(
                forward_step_func=plug,
                data_iterator=iter(data(parallel_state.get_tensor_model_parallel_rank() == 0)),
                model=[wrapped],
                num_microbatches=MICRO_BATCHES,
                seq_length=jobs.SEQUENCE,
                micro_batch_size=2,
                forward_only=False,
            )
        plug.close()
        figures = report.take()
        results[name] = SimpleNamespace(
            losses=losses,
            agreement=figures.agreement,
            weights=[o.out.weight.t() for o in observed],
            norm=part.decoder.final_layernorm.weight.main_grad.clone()
            if parallel_state.is_pipeline_last_stage()
            else None,
            seconds=figures.verifier_time,
            calls=verifier.calls if judged else [],
            keys=keys,
        )
    return results if parallel_state.is_pipeline_last_stage() else None


def teacher_job(settings) -> None:
    for name, (changes, _) in MODES.items():
        jobs.teacher_job(settings.replaced(name=name, **changes))


def direct(settings) -> dict[str, SimpleNamespace]:
    """Each mode in one process, from the reference: losses, weights and the gradient of the last norm."""
    from vcrd.loss import reference

    results = {}
    teacher = jobs.model(jobs.TEACHER, seed=2)
    for name, (changes, judged) in MODES.items():
        student = jobs.model(jobs.STUDENT, seed=1)
        losses, weights, total, agreed, counted = [], [], 0.0, 0.0, 0.0
        for batch in data(True):
            tokens, mask = batch["tokens"], batch["loss_mask"]
            positions = torch.arange(jobs.SEQUENCE).expand_as(tokens)
            q, p = student(tokens, positions, None), teacher(tokens, positions, None)
            stats = reference.statistics(q, p, batch["labels"], vocab_size=jobs.TRUE_VOCAB, mask=mask)
            if judged:
                both = (verdict(tokens, stats[f"{who}_action"]).log() for who in ("student", "teacher"))
            elif name == "scores":
                both = (batch[f"vcrd_{who}_validity"].log() for who in ("student", "teacher"))
            else:
                both = reference.log_validities(stats, "label")
            # Step 0 of one sample is not step 0 of the next.
            steps = batch["vcrd_steps"]
            steps = torch.where(steps >= 0, steps + 1000 * torch.arange(len(steps))[:, None], -1)
            weight, _ = reference.weights(*both, **jobs.weight_map(settings), steps=steps, mask=mask)
            agreed += ((stats["student_action"] == stats["teacher_action"]) * mask).sum()
            counted += mask.sum()
            if "top_k" in changes:
                log_p = p[..., : jobs.TRUE_VOCAB].double().log_softmax(-1)
                logprobs, ids = log_p.topk(changes["top_k"], -1)
                tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
                stats = reference.topk_statistics(
                    *(q, logprobs, ids, tail, batch["labels"]), vocab_size=jobs.TRUE_VOCAB, mask=mask
                )
            loss = weight * stats["divergence"]
            losses.append(loss.detach())
            weights.append(weight)
            total = total + (loss * mask).sum() / mask.sum() / MICRO_BATCHES
        total.backward()
        results[name] = SimpleNamespace(
            losses=losses,
            weights=weights,
            norm=student.decoder.final_layernorm.weight.grad,
            agreement=float(agreed / counted),
        )
    return results


def layout(tensor: tuple[int, int] = (0, 1), context: tuple[int, int] = (0, 1)):
    """A layout of (rank, size), in a world that is the one group of the parallelism that it has."""
    from vcrd.megatron.layout import Layout

    return Layout(
        tensor_rank=tensor[0],
        tensor_size=tensor[1],
        data_rank=0,
        data_size=1,
        context_rank=context[0],
        context_size=context[1],
        tensor_group=dist.group.WORLD if tensor[1] > 1 else None,
        vocab_size=jobs.TRUE_VOCAB,
        padded_vocab_size=jobs.TRUE_VOCAB,
        sequence_length=jobs.SEQUENCE,
        device=torch.device("cpu"),
        groups=SimpleNamespace(context=dist.group.WORLD),
    )


def sentences_of_wrong_fields() -> list[str]:
    """What each of two tensor ranks says of each of `wrong_batches`, one after another, then of a right one."""
    from vcrd.megatron.external_validity import ExternalValidity
    from vcrd.settings import DistillSettings

    rank = dist.get_rank()
    external = ExternalValidity(DistillSettings(validity="scores"), "tokens", None)
    external.take_steps()
    external.place(layout(tensor=(rank, 2)))
    labels = torch.zeros(2, 4, dtype=torch.long)
    found = []
    for batches in wrong_batches():
        iterator = external.watched(iter(batches) if rank == 0 else None)
        for _ in batches if rank == 0 else ():
            next(iterator)
        try:
            external.arguments(labels, None)
            found.append("right")
        except ValueError as error:
            found.append(str(error))
    return found


def a_check_that_comes_late() -> list[str]:
    """As on a GPU: a wrong micro-batch counts as one of equal validities until the next comes, or the end."""
    from vcrd.megatron.external_validity import ExternalValidity
    from vcrd.settings import DistillSettings

    rank = dist.get_rank()
    external = ExternalValidity(DistillSettings(validity="scores"), "tokens", None)
    external.take_steps()
    external.place(layout(tensor=(rank, 2)))
    external._defers = True
    right, wrong = wrong_batches()[-1], wrong_batches()[0]
    found = []
    for batches in (right, right, wrong, right, wrong):
        iterator = external.watched(iter(batches) if rank == 0 else None)
        for _ in batches if rank == 0 else ():
            next(iterator)
        try:
            got = external.arguments(torch.zeros(2, 4, dtype=torch.long), None)
            sums = [float(got[name].sum()) for name in ("steps", "student_validity", "teacher_validity")]
            found.append(str(sums))
        except ValueError as error:
            found.append(str(error))
    return found


def wrong_batches() -> list[list[dict[str, Tensor]]]:
    right = {"tokens": torch.ones(2, 4, dtype=torch.long), **fields((2, 4), 1)}
    wrong = [
        {key: value for key, value in right.items() if key != "vcrd_steps"},
        {**right, "vcrd_student_validity": right["vcrd_student_validity"][0]},
        {**right, "vcrd_teacher_validity": right["vcrd_teacher_validity"] + 0.99},
        {**right, "vcrd_teacher_validity": right["vcrd_teacher_validity"] * torch.nan},
        {**right, "vcrd_steps": right["vcrd_steps"].float()},
        {**right, "vcrd_steps": right["vcrd_steps"] - 1},
        {**right, "tokens": right["tokens"][:, :3]},
    ]
    return [*[[batch] for batch in wrong], [], [right, right], [right]]


def sentences_of_failing_verifiers() -> list[str]:
    """What each of two tensor ranks says of verifiers that fail."""
    from vcrd.megatron.external_validity import ExternalValidity
    from vcrd.settings import DistillSettings

    def raises(tokens, student_action, teacher_action):
        raise KeyError("no such problem")

    rank = dist.get_rank()
    labels = torch.zeros(2, 4, dtype=torch.long)
    action = torch.zeros(4, 2, dtype=torch.long)
    found = []
    for verifier in (
        raises,
        lambda *_: None,
        lambda tokens, *_: (tokens[0], tokens),
        lambda tokens, *_: (tokens, 2 * tokens),
        lambda tokens, *_: (tokens, tokens == 0),
    ):
        external = ExternalValidity(DistillSettings(), "tokens", verifier)
        external.place(layout(tensor=(rank, 2)))
        iterator = external.watched(iter([{"tokens": torch.ones(2, 4, dtype=torch.long)}]))
        next(iterator)
        judge = external.arguments(labels, None)["validity"]
        try:
            student, teacher = judge(SimpleNamespace(student_action=action, teacher_action=action))
            found.append(f"{student.shape[0]} {float(student.sum())} {float(teacher.sum())}")
        except RuntimeError as error:
            found.append(str(error))
    return found


def context_parallel(size: int, edges: list[int], judged: bool) -> dict[str, Tensor]:
    """The loss of this rank's positions of one micro-batch, split by hand over `size` context-parallel ranks."""
    import vcrd
    from vcrd.link.plan import context_rows
    from vcrd.megatron.external_validity import ExternalValidity
    from vcrd.settings import DistillSettings

    rank, sequence = dist.get_rank(), 24
    generator = torch.Generator().manual_seed(7)
    rows = 1 if edges else 2
    student, teacher = torch.randn(2, rows, sequence, 9, generator=generator) * 2
    mask = (torch.rand(rows, sequence, generator=generator) < 0.8).float()
    batch = {"tokens": torch.randint(9, (rows, sequence), generator=generator), **fields((rows, sequence), 9)}
    if edges:
        batch["cu_seqlens"] = torch.tensor([edges])
    columns = [c for span in context_rows(sequence, rank, size, edges) for c in range(span.start, span.stop)]
    settings = DistillSettings(validity="label" if judged else "scores")
    verifier = (lambda tokens, *actions: [verdict(tokens, a) for a in actions]) if judged else None
    external = ExternalValidity(settings, "tokens", verifier)
    external.take_steps()
    external.place(layout(context=(rank, size)))
    next(external.watched(iter([batch])))
    labels = batch["tokens"][:, columns]
    out = vcrd.validity_calibrated_kl(
        student[:, columns].transpose(0, 1),
        teacher[:, columns].transpose(0, 1),
        labels.t(),
        mask=mask[:, columns].t(),
        **{"validity": settings.validity, **external.arguments(labels, mask[:, columns])},
    )
    return {
        "columns": torch.tensor(columns),
        "weight": out.weight.t(),
        "loss": out.loss.t(),
        "whole": {"student": student, "teacher": teacher, "mask": mask, **batch},
    }
