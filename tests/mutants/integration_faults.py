"""Faults in the adapters to other systems, in what Megatron-Bridge needs, and in their examples."""

from __future__ import annotations

from faults import INTEGRATIONS, Fault

_SYSTEMS = "tests/integrations/test_{}.py"
_BRIDGE, _SLIME, _NEMO = (_SYSTEMS.format(name) for name in ("bridge", "slime", "nemo_rl"))
_MODELOPT, _VERL = _SYSTEMS.format("modelopt"), _SYSTEMS.format("verl")
_TRANSFORMERS, _AUTOMODEL = _SYSTEMS.format("transformers"), _SYSTEMS.format("automodel")


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, INTEGRATIONS, file, old, new, tests)


FAULTS = [
    _fault(
        "the part of a step is not multiplied by the processes that DDP divides by",
        "vcrd/integrations/transformers.py",
        "return loss.sum() * processes / num_items_in_batch",
        "return loss.sum() / num_items_in_batch",
        _TRANSFORMERS,
        "-k",
        "two_processes",
    ),
    _fault(
        "labels of -100 count in the loss of transformers",
        "vcrd/integrations/transformers.py",
        "counts = targets != IGNORED",
        "counts = targets != -1",
        _TRANSFORMERS,
        "-k",
        "equal_the_reference and llama",
    ),
    _fault(
        "figures are divided by all labels, of which the first ones have no logits",
        "vcrd/integrations/transformers.py",
        'targets = inputs.get("shift_labels", labels[:, 1:])',
        'targets = inputs.get("shift_labels", labels)',
        _TRANSFORMERS,
        "-k",
        "any_accumulation",
    ),
    _fault(
        "a step of GKD is divided by the tokens of the data set, not by those that were sampled",
        "vcrd/integrations/trl.py",
        "        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)\n"
        "        batches = [self._sampled(self._prepare_inputs(batch)) for batch in batches]\n"
        "        return batches, self._get_num_items_in_batch(batches, device)",
        "        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)\n"
        "        return [self._sampled(self._prepare_inputs(batch)) for batch in batches], count",
        _SYSTEMS.format("trl"),
        "-k",
        "that_were_sampled",
    ),
    _fault(
        "the loss of Automodel is multiplied by the temperature, not by its square",
        "vcrd/integrations/automodel.py",
        "out.loss.sum() * self.temperature**2 / count",
        "out.loss.sum() * self.temperature / count",
        _AUTOMODEL,
        "-k",
        "automodels_own_loss",
    ),
    _fault(
        "the criterion of ModelOpt does not see the model's loss mask",
        "vcrd/integrations/modelopt.py",
        'self._given = given.get("labels"), given.get("loss_mask")',
        'self._given = given.get("labels"), None',
        _MODELOPT,
        "-k",
        "of_the_reference and mean",
    ),
    _fault(
        "the tokens outside verl's top k have no mass",
        "vcrd/integrations/verl.py",
        "TopKLogits(logprobs, ids, log_tail(logprobs, mask))",
        "TopKLogits(logprobs, ids, torch.full_like(logprobs[..., 0], -16.0))",
        _VERL,
        "-k",
        "of_the_reference",
    ),
    _fault(
        "figures are not multiplied by the data-parallel ranks over which verl takes their mean",
        "vcrd/integrations/verl.py",
        'values, mask, "token-mean", dp_size=data["dp_size"], batch_num_tokens=data["batch_num_tokens"]',
        'values, mask, "token-mean", batch_num_tokens=data["batch_num_tokens"]',
        _VERL,
        "-k",
        "data_parallel_ranks",
    ),
    _fault(
        "slime's data ranks are counted with the context-parallel ones",
        "vcrd/integrations/slime.py",
        "data_rank=parallel_state.get_data_parallel_rank(),",
        "data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),",
        _SLIME,
        "-k",
        "alone and context",
    ),
    _fault(
        "scores stand at the tokens, not where these are predicted",
        "vcrd/integrations/slime.py",
        "values[first:last] = torch.as_tensor",
        "values[first + 1 : last + 1] = torch.as_tensor",
        _SLIME,
        "-k",
        "alone and one",
    ),
    _fault(
        "the shards of an uneven vocabulary begin where those of an even one would",
        "vcrd/integrations/nemo_rl.py",
        "width = local.shape[-1] if local is logits else -(-logits.shape[-1] // group.size())",
        "width = local.shape[-1]",
        _NEMO,
        "-k",
        "two_ranks",
    ),
    _fault(
        "Bridge's step is the one that has ended",
        "vcrd/megatron/training_loop.py",
        "return self._state.train_state.step + 1  # counted when the step has ended",
        "return self._state.train_state.step",
        _BRIDGE,
        "-k",
        "figures_reach_the_log",
    ),
    _fault(
        "the figures of a model that has its own groups leave out context ranks",
        "vcrd/megatron/layout.py",
        '"data_context": ("dp_cp", partial(',
        '"data_context": ("dp", partial(',
        "tests/megatron/test_layout.py",
    ),
    _fault(
        "packed samples are cut at the ends of their tokens, not of their padding",
        "vcrd/megatron/packing.py",
        '    "cu_seqlens_q_padded",\n    "cu_seqlens_kv_padded",\n    "cu_seqlens_padded",\n',
        "",
        _BRIDGE,
        "-k",
        "fine_tuning",
    ),
    _fault(
        "a checkpoint has the state of a loader from which micro-batches were drawn ahead",
        "vcrd/megatron/prefetch.py",
        "state = self._asked[0].loader_state if self._asked else self.source.save_state()",
        "state = self.source.save_state()",
        _BRIDGE,
        "-k",
        "goes_on_bit_for_bit and alone",
    ),
    _fault(
        "every chunk of a virtual pipeline's last rank is taken for the one with the loss",
        "vcrd/megatron/distillation.py",
        'last_stage = getattr(chunk, "post_process", True)',
        "last_stage = chunk.pg_collection.pp.rank() == chunk.pg_collection.pp.size() - 1",
        _BRIDGE,
        "-k",
        "first_step",
    ),
    _fault(
        "kept layers have the kinds of the first layers",
        "examples/bridge/prune.py",
        "[value[layer] for layer in kept]",
        "value[: len(kept)]",
        _SYSTEMS.format("bridge_examples"),
        "-k",
        "kinds",
    ),
    _fault(
        "a sampled token overwrites the keys and values of the one before",
        "examples/on_policy/sampling.py",
        "cache.sequence_len_offset = first\n",
        "cache.sequence_len_offset = max(first - 1, 0)\n",
        "tests/examples/test_on_policy.py",
        "-k",
        "samples_are",
    ),
    _fault(
        "each rank draws its own random numbers for the samples",
        "examples/on_policy/sampling.py",
        "torch.Generator().manual_seed(seed))",
        "torch.Generator().manual_seed(seed + dist.get_rank()))",
        "tests/examples/test_on_policy.py",
        "-k",
        "samples_are",
    ),
    _fault(
        "the logits of an output_processor are not multiplied by the model's scale",
        "vcrd/megatron/hooks.py",
        "return compute_language_model_loss(labels, scale_logits(logits))",
        "return compute_language_model_loss(labels, logits)",
        "tests/megatron/test_output_processor.py",
        "-k",
        "scaled",
    ),
]
