"""verl: the distillation loss mode "vcrd", in place of verl's forward KL over the teacher's top k.

`register` is called in every process of the job, before verl reads its configuration:

    # my_vcrd.py
    import vcrd
    from vcrd.integrations.verl import register

    register(vcrd.LossConfig(divergence="jsd", validity="confidence"))

    VERL_USE_EXTERNAL_MODULES=my_vcrd python -m verl.trainer.main_ppo \\
        distillation.distillation_loss.loss_mode=vcrd ...

verl's teacher server answers with the log-probabilities of the k best tokens, at temperature 1 and normalised over the
whole vocabulary. So the mass of all other tokens is known: it is 1 minus the sum of theirs. verl's own loss leaves that
mass out. Then student = teacher is no minimum: the gradient at each logit is (mass of the top k) q_j - p_j, and not 0.

Written for verl 0.9.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss.api import validity_calibrated_kl
from vcrd.loss.config import LossConfig, loss_config, refuse_given_validity, refuse_pooled
from vcrd.teacher_logits import TopKLogits

NAME = "vcrd"
# A mass that float32 log-probabilities do not tell from 0. The tail is never taken to be less: by rounding alone it
# would have no probability, and a reverse KL would be infinite.
_UNRESOLVED = 2.0**-23
_TOO_MUCH = 1e-4  # above 1: more than rounding adds to a sum of probabilities


def register(config: LossConfig | None = None, **options: Any) -> None:
    """Makes verl know the loss mode "vcrd". config, options: as of `vcrd.validity_calibrated_kl`.

    verl's registry has no place for a loss that reads the student's logits. So this also replaces
    `verl.trainer.distillation.losses.compute_topk_loss` by a function that calls the original for other loss modes.

    Raises ValueError for settings that verl's batches cannot serve, and for a second call.
    """
    config = loss_config(config, options)
    if config.temperature != 1:
        raise expected(
            "temperature", "1, because verl's teacher answers at temperature 1", config.temperature
        )
    refuse_given_validity(config, "one that is read from the two models")
    refuse_pooled(config)
    from verl.trainer.distillation import losses

    losses.register_distillation_loss(losses.DistillationLossSettings(names=[NAME], use_topk=True))(
        response_loss
    )
    original = losses.compute_topk_loss

    def compute_topk_loss(actor, distillation, data, student_logits, data_format):
        if distillation.distillation_loss.loss_mode != NAME:
            return original(actor, distillation, data, student_logits, data_format)
        return topk_loss(config, actor, distillation, data, student_logits, data_format)

    losses.compute_topk_loss = compute_topk_loss


def topk_loss(
    config: LossConfig, actor: Any, distillation: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """The loss of each position, as verl's engines ask for it while they hold the student's logits.

    student_logits: [1, packed tokens of this sequence- or context-parallel rank, vocabulary of this tensor rank], or,
        with data_format "bshd", [b, s, ...]. Kept for backward; copied if verl has another use for them.
    data: a TensorDict without padding, with `input_ids`, `prompts`, `responses`, `response_mask`, and the teacher's
        `teacher_logprobs` and `teacher_ids` [b, s, k].

    Returns float32 tensors of the leading shape of the logits. They are 0 at positions that predict no token of the
    response mask. Labels are the tokens of the response.

    Collectives: with Megatron those of `vcrd.validity_calibrated_kl` with TopKLogits in the tensor-parallel group.
    Raises ValueError for settings of verl that it cannot follow.
    """
    from verl.utils.tensordict_utils import get_non_tensor_data

    loss_settings = distillation.distillation_loss
    if loss_settings.use_policy_gradient:
        raise expected("use_policy_gradient", "False, because the loss itself is differentiated", True)
    if loss_settings.log_prob_min_clamp is not None:
        raise expected(
            "log_prob_min_clamp", "None, because the tail is exact", loss_settings.log_prob_min_clamp
        )
    if not bool((torch.as_tensor(data["temperature"]) == 1).all()):
        got = data["temperature"]
        raise expected("temperature", "1: verl divides the student's logits by it, not the teacher's", got)
    mask, labels = response_positions(data)
    logprobs, ids = data["teacher_logprobs"].values(), data["teacher_ids"].values()
    parts = [mask, labels, logprobs.float(), ids]
    group, vocab_size = None, config.vocab_size
    if actor.strategy == "megatron":
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        vocab_size = vocab_size or _true_columns(actor)
        parts = [_of_megatron_rank(part, data["input_ids"].offsets(), data_format) for part in parts]
    else:
        parts = [_of_ulysses_rank(part) for part in parts]
    mask, labels, logprobs, ids = parts
    if not get_non_tensor_data(data, "distillation_only", False):
        # verl reads these logits again, and some of its functions overwrite them.
        student_logits = student_logits.clone()
    out = validity_calibrated_kl(
        student_logits,
        TopKLogits(logprobs, ids, log_tail(logprobs, mask)),
        labels,
        config=config,
        mask=mask,
        group=group,
        vocab_size=vocab_size,
    )
    return {
        "distillation_losses": out.loss,
        "vcrd_weight": out.weight,
        "vcrd_relative_validity": out.relative_validity,
        "vcrd_teacher_mass": logprobs.exp().sum(-1),
    }


def response_loss(
    config: Any, distillation_config: Any, model_output: dict, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of each token of the responses, [b, response length], and the figures that verl logs.

    verl masks it with the response mask and reduces it as `loss_agg_mode` says. Figures are means over the tokens of
    the global batch: a sum over micro-batches of each one's part.
    """
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    if "vcrd_weight" not in model_output:
        raise expected("use_fused_kernels", "False, because fused kernels compute verl's own loss", True)
    mask = data["response_mask"]
    mask = mask.to_padded_tensor(0) if mask.is_nested else mask
    figures = {}
    for name in ("weight", "relative_validity", "teacher_mass"):
        values = no_padding_2_padding(model_output[f"vcrd_{name}"], data)
        mean = agg_loss(
            values, mask, "token-mean", dp_size=data["dp_size"], batch_num_tokens=data["batch_num_tokens"]
        )
        figures[f"distillation/{name}"] = Metric(AggregationType.SUM, mean)
    return no_padding_2_padding(model_output["distillation_losses"], data), figures


def response_positions(data: Any) -> tuple[Tensor, Tensor]:
    """For each of the packed tokens: whether it predicts a token that counts, bool, and that token, int64."""
    tokens, offsets, kept = data["input_ids"].values(), data["input_ids"].offsets(), data["response_mask"]
    if kept.is_nested:
        lengths, kept = kept.offsets().diff(), kept.to_padded_tensor(0)
    else:
        lengths = data["attention_mask"][:, data["prompts"].shape[1] :].sum(1)
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=tokens.device), offsets.diff(), output_size=len(tokens)
    )
    # The last token of a prompt predicts the first one of its response.
    place = torch.arange(len(tokens), device=tokens.device) - (offsets[1:] - 1 - lengths)[sequence]
    inside = (place >= 0) & (place < lengths[sequence])
    return inside & (kept[sequence, place.clamp(0, kept.shape[1] - 1)] != 0), tokens.roll(-1).long()


def log_tail(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log of the mass outside the top k, float32 [...], from log-probabilities [..., k]; it is at least 2^-23.

    Probabilities that add up to more than 1 are no probabilities of a whole vocabulary, and their tail is unknown:
    ValueError on CPU, and NaN on other devices, where reading a value would stall.
    """
    tail = 1 - logprobs.double().exp().sum(-1)
    wrong = (tail < -_TOO_MUCH) & (mask != 0)
    if wrong.device.type == "cpu" and wrong.any():
        what = "log-probabilities over the whole vocabulary, so that the mass of the tail is known"
        raise expected("teacher_logprobs", what, f"a mass of {float(1 - tail[wrong][0]):g} in the top k")
    return tail.clamp(min=_UNRESOLVED).masked_fill(wrong, torch.nan).log().float()


def _of_megatron_rank(values: Tensor, offsets: Tensor, data_format: str) -> Tensor:
    """This rank's part of packed values [tokens, ...], padded and split over context-parallel ranks as the tokens."""
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    split = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    return split(torch.nested.nested_tensor_from_jagged(values, offsets), pre_process=True)[0]


def _of_ulysses_rank(values: Tensor) -> Tensor:
    """This rank's part of packed values [tokens, ...], padded and split over sequence-parallel ranks: [1, ...]."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

    values = values[None]
    return slice_input_tensor(values, dim=1) if get_ulysses_sequence_parallel_world_size() > 1 else values


def _true_columns(actor: Any) -> int:
    """The vocabulary of the Hugging Face model, because Megatron pads the output layer."""
    model = getattr(getattr(actor, "model_config", None), "hf_config", None)
    if model is None:
        raise expected("vocab_size", "one in the LossConfig, because Megatron pads the output layer", "None")
    return model.get_text_config().vocab_size
