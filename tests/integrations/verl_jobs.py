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


def tensor_ranks(options: dict) -> tuple[Tensor, Tensor]:
    """On each of the tensor ranks: loss and the gradient of this rank's columns, with verl's Megatron loss."""
    from megatron.core import parallel_state

    from vcrd.integrations import verl

    verl.register(**options)
    case = Case()
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    logits = torch.nn.functional.pad(case.student, (0, 4)).chunk(size, -1)[rank].clone().requires_grad_()
    loss, _ = run(
        *configs("megatron"), case.data(), thd(case, logits, size), gather=lambda v: unpad(case, v, size)
    )
    loss.backward()
    return loss.detach(), logits.grad


def thd(case: Case, logits: Tensor, align: int) -> Tensor:
    """Packed as verl packs tokens for Megatron: each sequence padded to a multiple of `align`. [1, tokens, columns]."""
    parts = logits.split(case.lengths)
    return torch.cat([torch.nn.functional.pad(p, (0, 0, 0, -len(p) % align)) for p in parts])[None]


def unpad(case: Case, values: Tensor, align: int) -> Tensor:
    """The packed tokens of `thd` without the padding."""
    padded = [n + -n % align for n in case.lengths]
    return torch.cat([part[:n] for part, n in zip(values.split(padded), case.lengths, strict=True)])
