"""FP8 through Transformer Engine: a small teacher and student, the loss in FP8 and in bfloat16, on one GPU.

    python benchmarks/gpu_fp8.py [--json fp8.json]

Both models have the same bfloat16 parameters in all runs; in those in FP8 their linear layers multiply in FP8
(`fp8="hybrid"`) by one recipe each, and the output layer and the loss as in bfloat16. `make gpu-check` runs it where
Transformer Engine can be imported. Exits with 1 where a recipe does not run, or a loss or a gradient is not finite; how
far the losses are apart is reported and decides nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

# FP8 products take multiples of 16 in each dimension, tokens included; blocks are of 128.
VOCAB_SIZE, SEQUENCE, BATCH = 4096, 128, 2
STUDENT, TEACHER = {"hidden_size": 256, "heads": 4}, {"hidden_size": 512, "heads": 8}
STEPS = 4  # delayed scaling knows nothing of its first step's maxima
RECIPES = ("tensorwise", "blockwise", "delayed")  # of the student


def reason_to_skip() -> str | None:
    """Why FP8 cannot be tried here, in a sentence; None where it can."""
    for module, name in (
        ("transformer_engine", "Transformer Engine"),
        ("megatron", "megatron-core"),
    ):
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU that it can use"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return f"FP8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return None


def build(shape: dict, seed: int, recipe: str | None, engine: bool) -> torch.nn.Module:
    """A GPT model of two layers with bfloat16 parameters; recipe: of FP8; engine: of Transformer Engine's layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    quantised = {"fp8": "hybrid", "fp8_recipe": recipe} if recipe else {}
    if recipe == "delayed":
        quantised |= {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    on_cpu = {} if engine else {"use_cpu_initialization": True, "persist_layer_norm": False}
    config = TransformerConfig(
        num_layers=2,
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=2 * shape["hidden_size"],
        num_attention_heads=shape["heads"],
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        init_method_std=0.1,
        **quantised,
        **on_cpu,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if engine
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    model = GPTModel(config, spec, VOCAB_SIZE, SEQUENCE, position_embedding_type="rope")
    return Float16Module(config, model.cuda())


def of_teacher(recipe: str | None) -> str | None:
    """The student's, but for delayed scaling, which no teacher may have."""
    return "tensorwise" if recipe == "delayed" else recipe


def measure(recipe: str | None, engine: bool = True) -> dict:
    """The loss per token of each step and the norm of the last gradient; the weights stay as they are.

    One process's parallel state must exist. The teacher is in the same rank: `distill(forward_step, teacher=...)`.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import DistillSettings, distill

    student = build(STUDENT, 1, recipe, engine)
    teacher = build(TEACHER, 2, of_teacher(recipe), engine)
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (
        torch.randint(VOCAB_SIZE, (BATCH, SEQUENCE), generator=generator).cuda() for _ in range(2)
    )
    positions = torch.arange(SEQUENCE).cuda().expand(BATCH, SEQUENCE)

    def forward_step(data_iterator, model):
        next(data_iterator)
        losses = model(tokens, positions, None, labels=labels)
        return losses, lambda losses: (losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {})

    plug = distill(forward_step, DistillSettings(), teacher=teacher)
    student.train()
    losses = []
    try:
        for _ in range(STEPS):
            student.zero_grad(set_to_none=True)
            get_forward_backward_func()(
                forward_step_func=plug,
                data_iterator=iter([None]),
                model=student,
                num_microbatches=1,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            losses.append(plug.report.take().loss)
    finally:
        plug.close()
    norms = [p.grad.float().norm() for p in student.parameters() if p.grad is not None]
    return {"losses": losses, "gradient_norm": float(torch.stack(norms).norm())}


def summary(bf16: dict, fp8: dict[str, dict | str]) -> dict:
    """The runs, what lies between them, and whether all of it is finite. fp8: of each recipe, or why it did not run."""
    numbers, found = [*bf16["losses"], bf16["gradient_norm"]], {}
    for recipe, run in fp8.items():
        if isinstance(run, str):
            found[recipe] = {"error": run}
            continue
        first, second = bf16["losses"][-1], run["losses"][-1]
        numbers += [*run["losses"], run["gradient_norm"]]
        apart = {"loss_difference": second - first, "relative_difference": (second - first) / first}
        found[recipe] = {**run, **apart}
    ran = not any("error" in run for run in found.values())
    return {"passed": ran and all(map(math.isfinite, numbers)), "bf16": bf16, "fp8": found}


def lines(result: dict) -> str:
    """What is printed."""
    if result["passed"] is None:
        return result["how"]

    def line(name: str, run: dict) -> str:
        if "error" in run:
            return f"{name}: {run['error']}"
        text = f"{name}: loss {run['losses'][-1]:.5f} nat per token, gradient norm {run['gradient_norm']:.4g}"
        apart = run.get("loss_difference")
        return text + (
            f", {apart:+.5f} nat, {100 * run['relative_difference']:+.2f} %" if apart is not None else ""
        )

    rows = [line("bf16", result["bf16"]), *(line(f"fp8 {name}", run) for name, run in result["fp8"].items())]
    return "\n".join([*rows, *([] if result["passed"] else ["not every recipe ran, and to finite numbers"])])


def tried(recipe: str) -> dict | str:
    """What `measure` finds, or the error in a line: one recipe that a GPU does not have must not hide the others."""
    try:
        return measure(recipe)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def run() -> dict:
    """All runs on this GPU, or the reason why not."""
    reason = reason_to_skip()
    if reason is not None:
        return {"passed": None, "how": reason}
    import transformer_engine
    from megatron.core import parallel_state

    # What Megatron asks for with tensor parallelism, and does not mind without.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(0)
    with TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            result = summary(measure(None), {recipe: tried(recipe) for recipe in RECIPES})
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return {**result, "transformer_engine": str(getattr(transformer_engine, "__version__", "unknown"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    result = run()
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(lines(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
