"""A batch as verl's trainer packs it, and verl's two calls of its distillation loss."""

from __future__ import annotations

from itertools import accumulate

import torch
from tensordict import TensorDict
from torch import Tensor

PROMPTS, RESPONSES = (3, 1, 4, 2), (5, 6, 2, 3)  # tokens of each sequence
VOCAB, TOP_K = 96, 8


class Case:
    """Four sequences, the logits of a student and of a teacher at each token, and the tokens that count.

    Some tokens inside the responses do not count, as those of a tool in verl's conversations of several turns.
    """

    def __init__(self, seed: int = 0, top_k: int = TOP_K, same: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        total = sum(self.lengths)
        self.tokens = torch.randint(VOCAB, (total,), generator=draw)
        self.student = 2 * torch.randn(total, VOCAB, generator=draw)
        self.teacher = self.student.clone() if same else 2 * torch.randn(total, VOCAB, generator=draw)
        self.logprobs, self.ids = self.teacher.log_softmax(-1).topk(top_k)
        self.counts = [(torch.rand(r, generator=draw) < 0.7).long() for r in RESPONSES]
        for count in self.counts:
            count[0] = 1
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        # verl's teacher has no answer for the last token of a sequence: log-probabilities 0 of token 0.
        self.logprobs[ends], self.ids[ends] = 0.0, 0
        self.mask, self.labels = torch.zeros(total), torch.zeros(total, dtype=torch.long)
        for end, response, count in zip(ends.tolist(), RESPONSES, self.counts, strict=True):
            self.mask[end - response : end] = count.float()
            self.labels[end - response : end] = self.tokens[end - response + 1 : end + 1]

    def data(self, first: int = 0, last: int = 4, **more: object) -> TensorDict:
        """Sequences [first, last) as a micro-batch of the whole batch."""
        from verl.utils.tensordict_utils import assign_non_tensor

        starts = [0, *accumulate(self.lengths)]
        spans = list(zip(starts, self.lengths, strict=False))[first:last]

        def nested(values: Tensor) -> Tensor:
            return jagged([values[start : start + width] for start, width in spans])

        responses = RESPONSES[first:last]
        cut = zip(spans, responses, strict=True)
        parts = [(start, start + width - r, start + width) for (start, width), r in cut]
        data = TensorDict(
            {
                "input_ids": nested(self.tokens),
                "teacher_logprobs": nested(self.logprobs),
                "teacher_ids": nested(self.ids.int()),
                "prompts": jagged([self.tokens[a:b] for a, b, _ in parts]),
                "responses": jagged([self.tokens[b:c] for _, b, c in parts]),
                "response_mask": jagged(self.counts[first:last]),
            },
            batch_size=[last - first],
        )
        facts = {
            "temperature": 1.0,
            "dp_size": 1,
            "batch_num_tokens": int(self.mask.sum()),
            "global_batch_size": 4,
        }
        assign_non_tensor(data, **{**facts, "distillation_only": True, **more})
        return data

    def rows(self, first: int = 0, last: int = 4) -> slice:
        """The tokens of sequences [first, last)."""
        return slice(sum(self.lengths[:first]), sum(self.lengths[:last]))


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def configs(strategy: str = "fsdp", mode: str = "vcrd", aggregation: str = "token-mean", **loss: object):
    """verl's configuration of the actor and of the distillation."""
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    actor = ActorConfig(
        strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation
    )
    chosen = dict(
        loss_mode=mode,
        topk=TOP_K,
        use_task_rewards=False,
        use_policy_gradient=False,
        log_prob_min_clamp=None,
        loss_max_clamp=None,
    )
    return actor, DistillationConfig(distillation_loss=DistillationLossConfig(**{**chosen, **loss}))


def run(
    actor,
    distillation,
    data: TensorDict,
    logits: Tensor,
    data_format: str = "thd",
    gather=lambda values: values,
):
    """Both calls that verl's engines make: with the student's logits, then with what that gave. The loss and figures.

    gather: puts the results of this rank's positions together to those of all packed tokens.
    """
    from verl.trainer.distillation.losses import distillation_ppo_loss

    found = distillation_ppo_loss(
        actor, distillation, student_logits=logits, data=data, data_format=data_format
    )
    offsets = data["input_ids"].offsets()
    output = {
        name: torch.nested.nested_tensor_from_jagged(gather(values.squeeze(0)), offsets)
        for name, values in found.items()
    }
    return distillation_ppo_loss(actor, distillation, model_output=output, data=data)


def two_ranks(options: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """On each of two ranks, for each way to split a batch: loss, and the gradient of what this rank holds.

    In one world, because each process takes seconds to import verl.
    """
    from megatron.core import parallel_state

    from vcrd.integrations import verl

    verl.register(**options)
    case, group = Case(), parallel_state.get_tensor_model_parallel_group()
    columns = torch.nn.functional.pad(case.student, (0, 4)).chunk(group.size(), -1)[group.rank()]
    found = {"tensor": of_megatron(case, columns.clone().requires_grad_())}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    found["context"] = of_megatron(case, case.student.clone().requires_grad_())
    return {**found, "ulysses": of_fsdp(case)}


def of_megatron(case: Case, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of logits [tokens, columns], packed and gathered as verl's Megatron engine does it."""
    from verl.models.mcore.util import postprocess_thd_engine, preprocess_thd_engine

    data = case.data()
    tokens = data["input_ids"]
    nested = torch.nested.nested_tensor_from_jagged(leaf, tokens.offsets())
    logits, packed, _ = preprocess_thd_engine(nested, pre_process=True)

    def gather(values: Tensor) -> Tensor:
        return postprocess_thd_engine(values[None], packed, tokens, len(case.lengths)).values()

    loss, _ = run(*configs("megatron"), data, logits, gather=gather)
    loss.backward()
    return loss.detach(), leaf.grad


def of_fsdp(case: Case) -> tuple[Tensor, Tensor]:
    """Loss and gradient of two sequence-parallel ranks, split and gathered as verl's FSDP engine does it."""
    import torch.distributed as dist
    from verl.utils import ulysses

    ulysses.set_ulysses_sequence_parallel_group(dist.new_group())
    leaf = case.student.clone().requires_grad_()
    padding = len(leaf) % 2

    def gather(values: Tensor) -> Tensor:
        return ulysses.gather_outputs_and_unpad(values, 0, 0, padding, grad_scaler=False)

    loss, _ = run(*configs(), case.data(), ulysses.slice_input_tensor(leaf, 0)[None], gather=gather)
    loss.backward()
    return loss.detach(), leaf.grad
