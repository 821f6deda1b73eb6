"""Settings of Megatron that do not go together with distillation are refused with a sentence."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from vcrd.megatron.compatibility import check_compatibility

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"`(--[a-z0-9-]+)")
CLEAN = {
    "cross_entropy_loss_fusion": True,
    "tp_comm_overlap": True,
    "cuda_graph_impl": "local",
    "cuda_graph_scope": "attn",
    "tensor_model_parallel_size": 2,
}


def check(config=None, args=None, remote=True, **model):
    model = {"forward": lambda input_ids: input_ids, **model}
    chunk = SimpleNamespace(config=SimpleNamespace(**{**CLEAN, **(config or {})}), **model)
    check_compatibility(chunk, SimpleNamespace(**(args or {})), remote)


def test_what_does_not_clash_passes():
    check(
        args={
            "logits_load_dir": None,
            "reset_position_ids": False,
            "export_kd_teacher_load": None,
            "inprocess_restart": False,
        },
        parallel_output=True,
    )


@pytest.mark.parametrize(
    ("config", "args", "model", "name"),
    [
        ({"overlap_moe_expert_parallel_comm": True}, {}, {}, "overlap_moe_expert_parallel_comm"),
        ({"cuda_graph_impl": "full_iteration"}, {}, {}, "cuda_graph_impl"),
        ({"cuda_graph_scope": "full_iteration"}, {}, {}, "cuda_graph_impl"),
        ({"cuda_graph_scope": [SimpleNamespace(name="full_iteration")]}, {}, {}, "cuda_graph_impl"),
        ({}, {}, {"parallel_output": False}, "parallel_output"),
        ({"hybrid_context_parallel": True}, {}, {}, "hybrid_context_parallel"),
        ({}, {"inprocess_restart": True}, {}, "inprocess_restart"),
        ({}, {"logits_load_dir": "cache"}, {}, "logits_load_dir"),
        ({}, {"export_kd_teacher_load": "teacher"}, {}, "export_kd_teacher_load"),
        ({}, {"reset_position_ids": True}, {}, "reset_position_ids"),
        ({}, {"reset_attention_mask": True}, {}, "reset_attention_mask"),
    ],
)
def test_a_clash_is_one_sentence_that_names_the_argument(config, args, model, name):
    with pytest.raises(
        ValueError, match=f"^{name}: expected .*, got .*; vcrd does not work with it, because "
    ):
        check(config, args, **model)


def test_the_schedule_that_overlaps_experts_needs_an_output_processor_and_a_teacher_in_another_job():
    config = {"overlap_moe_expert_parallel_comm": True}

    def forward(input_ids, *, output_processor=None):
        return input_ids

    check(config, forward=forward)
    with pytest.raises(
        ValueError, match="because its schedule never calls the student's forward, in which a"
    ):
        check(config, remote=False, forward=forward)
    with pytest.raises(ValueError, match="output_processor alone, and this model has none"):
        check(config)


def test_a_teacher_in_the_same_ranks_is_given_what_the_dataset_made():
    chunk, args = SimpleNamespace(config=SimpleNamespace(**CLEAN)), SimpleNamespace(reset_position_ids=True)
    check_compatibility(chunk, args, remote=False)


def test_the_documentation_lists_what_is_refused_and_nothing_else():
    text = (ROOT / "docs" / "pretraining.md").read_text()
    table = next(part for part in text.split("## What is refused")[1].split("\n\n") if part.startswith("|"))
    documented = {
        name.removeprefix("--").replace("-", "_") for row in table.splitlines() for name in NAME.findall(row)
    }
    refused = {
        node.args[0].value
        for node in ast.walk(ast.parse((ROOT / "vcrd" / "megatron" / "compatibility.py").read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "_refuse"
        and isinstance(node.args[0], ast.Constant)
    }
    # What the rows say besides, and what is refused elsewhere or under a name that is no argument.
    besides = {
        "cuda_graph_scope", "vcrd_fused_head", "mtp_num_layers", "defer_embedding_wgrad_compute", "fp8_output_proj",
        "fp8_recipe", "vcrd_normalization", "reset_position_ids", "reset_attention_mask",
        "vcrd_steps", "vcrd_weighting", "context_parallel_size", "expert_model_parallel_size",
    }  # fmt: skip
    assert documented - besides == refused - {"parallel_output", "cp_partition_mode"}
    assert "`parallel_output`" in table and "`cp_partition_mode`" in table
