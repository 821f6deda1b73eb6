"""What processes do in the tests of a teacher's context, and a run of the teacher on each concatenation by itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import colocated_jobs
import jobs
import packing_jobs
import torch
import torch.distributed as dist
from torch import Tensor

from examples.demo.convert import Place, load, to_hugging_face
from examples.demo.model import Shape, build, configure
from vcrd.link import host_rendezvous
from vcrd.link.plan import context_rows
from vcrd.link.question import Context
from vcrd.link.student import StudentLink
from vcrd.megatron.teacher_context import CONTEXT_KEY, POSITIONS_KEY
from vcrd.teacher_logits import HiddenStates, TopKLogits

LONGEST = 9  # tokens of context that a sequence may have
LOCAL, DEEP = colocated_jobs.TEACHER, colocated_jobs.INTERLEAVED_TEACHER


class Case(NamedTuple):
    """A micro-batch: tokens [b, s], the edges of packed sequences, and the context of each row or sequence."""

    tokens: Tensor
    edges: list[int]
    contexts: list[
        tuple[list[int], list[int]]
    ]  # of each: tokens, and the positions before which they are seen

    @property
    def cuts(self) -> list[tuple[int, int]]:
        batch, width = self.tokens.shape
        edges = self.edges or list(range(0, batch * width + 1, width))
        return list(zip(edges, edges[1:], strict=False))

    @property
    def flat(self) -> Context:
        """As a question holds it."""
        tokens = [token for found, _ in self.contexts for token in found]
        cuts = zip(self.contexts, self.cuts, strict=True)
        places = [start + position for (_, positions), (start, _) in cuts for position in positions]
        return Context(torch.tensor(tokens, dtype=torch.int64), torch.tensor(places, dtype=torch.int64))


def cases(seed: int, packed: bool, step: int = 1, count: int = 4) -> list[Case]:
    """Micro-batches of random tokens, some sequences of which have a random context. step: of all lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    found = []
    for number in range(count):
        edges: list[int] = []
        if packed:
            inner = draw(1, jobs.SEQUENCE // step, 2)
            edges = sorted({0, *(step * edge for edge in inner), jobs.SEQUENCE})
        batch = 1 if packed else 2
        lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)] or [jobs.SEQUENCE] * batch
        contexts: list[tuple[list[int], list[int]]] = []
        for length in lengths:
            # The first micro-batch has none, and others have it in some rows only.
            (size,) = draw(0, LONGEST + 1, 1) if number and draw(0, 3, 1) != [0] else (0,)
            contexts.append((draw(0, jobs.TRUE_VOCAB, size), sorted(draw(0, length, size))))
        tokens = torch.randint(jobs.TRUE_VOCAB, (batch, jobs.SEQUENCE), generator=generator)
        found.append(Case(tokens, edges, contexts))
    return found


def model(shape: Shape = jobs.TEACHER, seed: int = 2, **config) -> torch.nn.Module:
    """This rank's part of a model that takes longer sequences than the student's."""
    part = build(shape, replace(configure(shape, shape.layers), **config), jobs.SEQUENCE + LONGEST)
    load(part, jobs.weights(shape, seed).__getitem__, shape, range(shape.layers))
    return part


def check_positions(teacher: torch.nn.Module) -> None:
    """It is given no position that it may lack."""

    def check(chunk, args, kwargs):
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        assert positions is None or int(positions.max()) < chunk.max_sequence_length

    teacher.register_forward_pre_hook(check, with_kwargs=True)


def serve(settings, microbatches: int | None = None) -> int:
    from vcrd.megatron import serve

    return serve(model(), settings, microbatches=microbatches)


@torch.no_grad()
def alone(teacher: torch.nn.Module, case: Case) -> Tensor:
    """Logits [s, b, v] for the student's positions, from one run of the teacher for each sequence with its context."""
    batch, width = case.tokens.shape
    flat, rows = case.tokens.flatten().tolist(), []
    for (start, stop), (context, positions) in zip(case.cuts, case.contexts, strict=True):
        seen, own, rest = [], [], list(zip(positions, context, strict=True))
        for position in range(stop - start):
            while rest and rest[0][0] <= position:
                seen.append(rest.pop(0)[1])
            own.append(len(seen))
            seen.append(flat[start + position])
        logits = teacher(torch.tensor([seen]), torch.arange(len(seen))[None], None)
        rows.append(logits[0, own])
    return torch.cat(rows).view(batch, width, -1).transpose(0, 1)


def truths(groups: list[list[Case]]) -> list[list[Tensor]]:
    teacher = model().eval()
    return [[alone(teacher, case)[..., : jobs.TRUE_VOCAB] for case in group] for group in groups]


def ask(settings, asked: list[Case], context_size: int = 1) -> list[Tensor]:
    """Log-probabilities [s / context_size, b, v] that this rank receives from the teacher."""
    rank = dist.get_rank()
    rendezvous = host_rendezvous(settings.link) if rank == 0 else None
    link = StudentLink.connect(
        settings.link,
        vocab_size=jobs.TRUE_VOCAB,
        padded_vocab_size=jobs.STUDENT.vocab_size,
        sequence_length=jobs.SEQUENCE,
        tensor_rank=0,
        tensor_size=1,
        data_rank=0,
        data_size=1,
        context_rank=rank,
        context_size=context_size,
    )
    if rank == 0:
        for case in asked:
            link.request(case.tokens, case.edges, case.flat)
    answers = [_log_probabilities(link.receive(number)) for number in range(len(asked))]
    link.close()
    if rendezvous is not None:
        rendezvous.close()
    return answers


def _log_probabilities(answer) -> Tensor:
    if isinstance(answer, TopKLogits):  # of all tokens
        order = answer.ids.long().argsort(-1)
        return answer.logprobs.gather(-1, order)
    if isinstance(answer, HiddenStates):
        return (answer.scale * answer.states @ answer.weight.T).log_softmax(-1)
    logits = answer.logits
    if logits.dtype == torch.uint8:
        logits = -24 * (logits.float() / 255) ** 2
    return logits.float().log_softmax(-1)


def part_of(truth: Tensor, case: Case, rank: int, size: int) -> Tensor:
    """The positions that a context-parallel rank holds."""
    spans = context_rows(jobs.SEQUENCE, rank, size, case.edges)
    return torch.cat([truth[span.start : span.stop] for span in spans])


def micro_batches(group: list[Case]) -> list[dict]:
    """As a data loader makes them: the context as a padded tensor, or as lists; without positions before the sample."""
    generator = torch.Generator().manual_seed(9)
    found = []
    for number, case in enumerate(group):
        shape = case.tokens.shape
        batch = {
            "tokens": case.tokens,
            "labels": torch.randint(jobs.TRUE_VOCAB, shape, generator=generator),
            "loss_mask": (torch.rand(shape, generator=generator) < 0.7).float(),
        }
        if case.edges:
            batch["cu_seqlens"] = torch.tensor([case.edges])
        tokens, positions = zip(*case.contexts, strict=True)
        if number % 2:
            tokens, positions = _padded(tokens), _padded(positions)
        if number:
            batch |= {CONTEXT_KEY: tokens, POSITIONS_KEY: positions}
        found.append(batch)
    return found


def _padded(rows: tuple[list[int], ...]) -> Tensor:
    parts = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1)


def counted(edges: list[int]) -> Tensor:
    """The position of each token of a row in its packed sequence."""
    edges = edges or [0, jobs.SEQUENCE]
    return torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:], strict=False)])


def step_of(losses: list[Tensor], packs: bool = True, mask_between: Tensor | None = None):
    """A script's forward step, which keeps packed sequences apart by a mask. packs: whether it draws on every stage, or
    like Megatron's scripts on the first and the last one, with `mask_between` on the others."""

    def forward_step(data_iterator, chunk):
        from megatron.core import parallel_state

        if not (packs or chunk.module.pre_process or chunk.module.post_process):
            return chunk(None, None, mask_between), None
        batch = next(data_iterator)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            assert not any(key.startswith("vcrd_") for key in batch)
        edges, mask = [], None
        if "cu_seqlens" in batch:
            edges = batch["cu_seqlens"][0].tolist()
            mask = packing_jobs.blocks(edges)
        positions = counted(edges).expand_as(batch["tokens"])
        output = chunk(batch["tokens"], positions, mask, labels=batch["labels"], loss_mask=batch["loss_mask"])

        def loss_func(output):
            losses.append(output.detach().clone())
            return (output * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int(), {}

        return output, loss_func

    return forward_step


def local_shape(chunks: int, stages: int) -> Shape:
    """Of a teacher with a layer for each of them."""
    return LOCAL if chunks * stages <= LOCAL.layers else DEEP


def train(
    settings,
    group: list[Case],
    local: bool,
    per_rank: int | None = None,
    packs: bool = False,
    mask_between: Tensor | None = None,
) -> SimpleNamespace:
    """Losses [b, s] and gradients of one step of the student. local: whether the teacher is in the same ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    mine = jobs.chunks(jobs.STUDENT, 1, per_rank)
    wrapped = []
    for _, part in mine:
        part.config.variable_seq_lengths = local
        part.config.finalize_model_grads_func = finalize
        wrapped.append(DistributedDataParallel(part.config, DistributedDataParallelConfig(), part))
    teacher = None
    if local:
        theirs = [part for _, part in jobs.chunks(local_shape(len(mine), mine[0][0].stages), 2, per_rank)]
        for part in theirs:
            part.max_sequence_length += LONGEST
            check_positions(part)
        teacher = theirs if per_rank else theirs[0]
    losses: list[Tensor] = []
    plug = distill(step_of(losses, packs, mask_between), settings, teacher=teacher)
    batches = micro_batches(group)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    iterators = [iter(batches) for _ in mine]
    try:
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iterators if per_rank else iterators[0],
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=jobs.SEQUENCE,
            micro_batch_size=len(group[0].tokens),
            forward_only=False,
        )
        gradients = {
            place: {name: p.main_grad.clone() for name, p in part.named_parameters()} for place, part in mine
        }
    finally:
        plug.close()
    return SimpleNamespace(losses=losses, gradients=gradients)


def trained(settings, variants: list[dict], local: bool) -> list[SimpleNamespace]:
    """One student after another. variants: arguments of `train`, and a payload."""
    found = []
    for variant in variants:
        variant = dict(variant)
        chosen = settings.replaced(payload=variant.pop("payload", "float32"))
        found.append(train(chosen, local=local, **variant))
    return found


def reference_step(settings, group: list[Case], shape: Shape) -> SimpleNamespace:
    """The same step in one process: the teacher alone on each concatenation, reference losses, autograd."""
    from vcrd.loss import reference

    student, teacher = jobs.model(jobs.STUDENT, seed=1), model(shape).eval()
    losses, total = [], 0.0
    for case, batch in zip(group, micro_batches(group), strict=True):
        mask = packing_jobs.blocks(case.edges) if case.edges else None
        q = student(case.tokens, counted(case.edges).expand_as(case.tokens), mask)
        p = alone(teacher, case).transpose(0, 1)
        options = {"name": settings.divergence, "temperature": 1.0, "alpha": 0.1, "beta": 0.5}
        labels, counts = batch["labels"], batch["loss_mask"]
        stats = reference.statistics(q, p, labels, vocab_size=jobs.TRUE_VOCAB, mask=counts, **options)
        weight = jobs.expected_weights(settings, stats, counts)
        loss = weight * stats["divergence"]
        losses.append(loss.detach())
        total = total + (loss * counts).sum() / counts.sum() / len(group)
    total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return SimpleNamespace(losses=losses, gradients=to_hugging_face({Place(): gradients}, jobs.STUDENT, 4))


def references(settings, groups: list[tuple[list[Case], Shape]]) -> list[SimpleNamespace]:
    return [reference_step(settings, group, shape) for group, shape in groups]


def refusals(settings, wrongs: list[dict], local: bool) -> list[str]:
    """The sentence of each wrong micro-batch, the first of a student."""
    from vcrd.megatron import distill

    (case,) = cases(0, packed=False, count=1)
    student, teacher = jobs.model(jobs.STUDENT, seed=1).train(), None
    if local:
        teacher = jobs.model(LOCAL, seed=2)
        teacher.max_sequence_length += LONGEST
    sentences = []
    for wrong in wrongs:
        plug = distill(step_of([]), settings, teacher=teacher)
        try:
            plug(iter([{**micro_batches([case])[0], **wrong}]), student)
        except ValueError as error:
            sentences.append(str(error))
        else:
            sentences.append("accepted")
        plug.close()
    return sentences


def shapes_of_logits(settings, asked: list[Case]) -> list[list[int]]:
    """Of each answer of a served teacher, what its output layer made."""
    from vcrd.megatron import serve

    teacher, shapes = model(), []
    check_positions(teacher)
    teacher.output_layer.register_forward_hook(lambda *call: shapes.append(list(call[-1][0].shape)))
    assert serve(teacher, settings) == len(asked)
    return shapes


class _Gathered(torch.autograd.Function):
    """[w, ..] of each of the context-parallel ranks, as one tensor. Its gradient reaches the rank that has it."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


def attend_over_context_ranks() -> None:
    """Megatron's local attention works with context parallelism: it gathers keys and values.

    It reads the edges of packed sequences, and has the name of Transformer Engine's, which does both by itself.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    build_whole, attend = DotProductAttention.__init__, DotProductAttention.forward

    def init(self, config, *args, **rest):
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        build_whole(self, alone, *args, **rest)

    def forward(self, query, key, value, mask, packed_seq_params=None, **rest):
        rank, size = parallel_state.get_context_parallel_rank(), 2
        width, edges = len(query) * size, [0, len(query) * size]
        if packed_seq_params is not None:
            edges = packed_seq_params.cu_seqlens_q.tolist()
            query, key, value = (each.unsqueeze(1) for each in (query, key, value))
        held = [context_rows(width, each, size, edges) for each in range(size)]
        held = [torch.cat([torch.arange(span.start, span.stop) for span in spans]) for spans in held]
        order, group = torch.cat(held).argsort(), parallel_state.get_context_parallel_group()
        whole = [_Gathered.apply(each, group)[order] for each in (key, value)]
        found = attend(self, query, *whole, packing_jobs.blocks(edges)[:, :, held[rank]], **rest)
        return found if packed_seq_params is None else found.squeeze(1)

    DotProductAttention.__init__, DotProductAttention.forward = init, forward
    DotProductAttention.__name__ = "TEDotProductAttention"


@torch.no_grad()
def beside_context_ranks(settings, group: list[Case]) -> list[Tensor]:
    """Losses [b, s / 2] of this one of two context-parallel ranks, whose teacher is in the same ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from vcrd.megatron import distill

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    attend_over_context_ranks()
    student, teacher = (
        model(shape, seed, context_parallel_size=2) for shape, seed in ((jobs.STUDENT, 1), (LOCAL, 2))
    )
    rank = parallel_state.get_context_parallel_rank()

    def forward_step(data_iterator, chunk):
        batch = next(data_iterator)
        edges = batch["cu_seqlens"][0].tolist() if "cu_seqlens" in batch else []
        spans = context_rows(jobs.SEQUENCE, rank, 2, edges)
        columns = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        positions = counted(edges).expand_as(batch["tokens"])
        given = {name: batch[name][:, columns] for name in ("labels", "loss_mask")}
        if edges:
            whole = packing_jobs.parametrized({**batch, "position_ids": positions}, edges)
            given["packed_seq_params"] = whole["packed_seq_params"]
        return chunk(batch["tokens"][:, columns], positions[:, columns], None, **given), None

    plug = distill(forward_step, settings, teacher=teacher)
    iterator, student = iter(micro_batches(group)), student.train()
    try:
        return [plug(iterator, student)[0] for _ in group]
    finally:
        plug.close()


def picked_logits() -> list[tuple[bool, bool]]:
    """Whether a layer of Megatron with its shard of columns multiplies the student's positions, and whether it is as it
    was before; with and without sequence parallelism."""
    from megatron.core import parallel_state, tensor_parallel

    from vcrd.megatron.teacher_context import TeacherRows, for_students_alone

    group, found = parallel_state.get_tensor_model_parallel_group(), []
    rows = TeacherRows.of(2, 5, torch.empty(0, dtype=torch.int64), torch.tensor([0, 3, 9]), 8)
    states = torch.randn(8, 2, jobs.STUDENT.hidden, generator=torch.Generator().manual_seed(1))
    for sequence_parallel in (False, True):
        config = configure(jobs.STUDENT, 1)
        config.sequence_parallel = sequence_parallel
        layer = tensor_parallel.ColumnParallelLinear(
            jobs.STUDENT.hidden, 12, config=config, init_method=None, bias=False, gather_output=False
        )
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2 + group.rank()))
        own = states.chunk(2)[group.rank()] if sequence_parallel else states
        with torch.no_grad(), for_students_alone(SimpleNamespace(output_layer=layer), rows, group):
            logits, _ = layer(own)
        whole = states @ layer.weight.T
        expected = torch.stack([whole[[1, 2, 3, 5, 6], 0], whole[[0, 1, 2, 3, 5], 1]], 1)
        same = torch.allclose(logits, expected, atol=1e-5) and logits.shape == expected.shape
        found.append((same, layer.sequence_parallel == sequence_parallel and not layer._forward_pre_hooks))
    return found
