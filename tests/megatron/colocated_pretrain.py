"""The pretraining script with a teacher in the same ranks, built by the model provider as the documentation says."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import examples.pretrain_vcrd as script  # noqa: E402
import vcrd.megatron  # noqa: E402


def build(config, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    args = script.get_args()
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )


def main() -> None:
    script.keep_compiled_helpers()
    args = script.parse_and_validate_args(
        extra_args_provider=script.add_vcrd_args, args_defaults={"tokenizer_type": "NullTokenizer"}
    )
    teachers: list[torch.nn.Module] = []

    def model_provider(pre_process=True, post_process=True, vp_stage=None, **rest):
        student_config, teacher_config = (script.core_transformer_config_from_args(args) for _ in range(2))
        # 24, where no size of the student's is.
        teacher_config.hidden_size = teacher_config.ffn_hidden_size = 24
        teacher_config.kv_channels = 24 // teacher_config.num_attention_heads
        student = build(student_config, pre_process, post_process, vp_stage)
        teachers.append(build(teacher_config, pre_process, post_process, vp_stage).eval())
        student.config.variable_seq_lengths = True
        return student

    container = script.pretrain_cfg_container_from_args(args, script.gpt_config_from_args(args))
    container.model = None  # so that the provider is asked
    plug = vcrd.megatron.distill(
        script.forward_step, script.settings_from_args(args), teacher=lambda: teachers
    )
    script.pretrain(container, script.datasets, script.ModelType.encoder_or_decoder, plug, model_provider)
    plug.close()


if __name__ == "__main__":
    main()
