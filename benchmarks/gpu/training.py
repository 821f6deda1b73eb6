"""Measures how distillation slows a Megatron training step on one GPU, if the answers are in memory.

    python -m benchmarks.gpu.training [--layers 16] [--hidden 2048] [--vocab 131072] [--json training.json]

The model is a GPT in bfloat16 with the layer sizes of a model of 1 B parameters, with Megatron's data-parallel wrapper,
schedule and Adam with float32 masters. It uses Transformer Engine's layers if they are installed, otherwise Megatron's
local layers. Their attention is slower, so the same loss is a smaller part of the step. A step has one micro-batch. The
teacher's answers are on the GPU in the form that the link delivers. The step contains neither a teacher nor the link.

The losses alternate in blocks of steps, on one model:

- cross-entropy: Megatron's, with its loss fusion (the baseline) and without it,
- plug: `vcrd.megatron.distill`, in place, and with the fused head.

The exit status is 1 if a loss or a gradient is not finite, or if those of the fused head differ from those of the plug.
The time of a step does not change the exit status.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import Batch, Shape, build, forward_backward, forward_step, one_rank
from device_measure import CudaClock, HostClock

SHAPE = Shape(16, 2048, 8192, 32, vocab=131072, sequence=4096, groups=8, gated=True, tied=True)
ROUNDS, STEPS = 3, 5
SECONDS = 50  # no round begins after this, so that slow layers only reduce the number of rounds
WARMUPS = 3  # the plug checks the model in its first step
# Relative difference of the fused head from the plug, whose logits are rounded to bfloat16.
LARGEST_DIFFERENCE = 0.02
PLAIN, UNFUSED, PLUG, HEAD = "cross-entropy", "cross-entropy, unfused", "plug", "plug, fused head"


class ReadyTeacher(nn.Module):
    """Replaces a teacher model. It alternates between given answers [s, b, v], because a run reads no answer twice.

    `distill(forward_step, teacher=...)` treats it as a model in the student's rank.
    """

    def __init__(self, student: nn.Module, answers: list[Tensor]) -> None:
        super().__init__()
        self.config = student.config
        self.pre_process = self.post_process = True
        self.vocab_size, self.max_sequence_length = student.vocab_size, student.max_sequence_length
        self._answers, self._given = answers, 0

    def restart(self) -> None:
        """Starts again with the first answer, so that every loss ends with the same one."""
        self._given = 0

    def set_input_tensor(self, tensor: Any) -> None:
        """Does nothing, because there is no previous stage."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """[b, s, v], as a model returns its logits."""
        answer = self._answers[self._given % len(self._answers)]
        self._given += 1
        return answer.transpose(0, 1)


def answers_of(shape: Shape, micro_batch: int, count: int = 2) -> list[Tensor]:
    """The form of the default payload: the distance of each logit from the largest of its row, in float16."""
    found = []
    for number in range(count):
        torch.manual_seed(100 + number)
        answer = torch.empty(
            shape.sequence, micro_batch, shape.vocab, dtype=torch.float16, device=torch.device("cuda")
        )
        for rows in answer.split(
            256
        ):  # in blocks: float32 of the whole would need twice the memory of the answer
            logits = 3 * torch.randn(rows.shape, device=torch.device("cuda"))
            rows.copy_(logits - logits.amax(-1, keepdim=True))
        found.append(answer)
    return found


@dataclass
class Times:
    """Results of one loss: seconds of each step, growth of device memory in a step, last loss and norm."""

    seconds: list[float] = field(default_factory=list)
    step_bytes: int = 0
    loss: float = math.nan
    gradient_norm: float = math.nan


class Training:
    """The model, its optimizer, and the micro-batch of every step."""

    def __init__(self, shape: Shape, micro_batch: int, engine: bool, **settings: Any) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        inner = build(shape, 1, None, engine, **settings)
        self.config = inner.module.config
        self.config.finalize_model_grads_func = finalize_model_grads
        self.model = DistributedDataParallel(
            self.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner
        )
        self.parameters = sum(parameter.numel() for parameter in inner.parameters())
        self._optimizer = get_megatron_optimizer(
            # The steps are so small that all losses see the same model.
            OptimizerConfig(
                optimizer="adam", lr=1e-7, min_lr=1e-7, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        generator = torch.Generator().manual_seed(3)
        self._batch = Batch.draw(shape, micro_batch, generator)
        self.teacher = ReadyTeacher(inner.module, answers_of(shape, micro_batch))
        self.model.train()

    def step(self, forward: Callable) -> float:
        """Runs one whole step and returns the norm of its gradient."""
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
        forward_backward(forward, self.model, self._batch)
        _, norm, _ = self._optimizer.step()
        return float(norm)


def measure(
    shape: Shape,
    micro_batch: int,
    engine: bool,
    clock: CudaClock | HostClock,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    **settings: Any,
) -> dict:
    """Measures each loss. The parallel state of one process must exist. settings: for Megatron's configuration."""
    from vcrd.megatron import DistillSettings, distill

    training = Training(shape, micro_batch, engine, **settings)
    found = {name: Times() for name in (PLAIN, UNFUSED, PLUG, HEAD)}
    started = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - started > SECONDS:
            break
        for name, times in found.items():
            last: dict[str, Tensor] = {}

            def plain(data_iterator: Any, model: Any, last: dict[str, Tensor] = last) -> tuple:
                losses, loss_func = forward_step(data_iterator, model)
                last["losses"] = losses.detach()
                return losses, loss_func

            training.config.cross_entropy_loss_fusion = name != UNFUSED
            training.config.cross_entropy_fusion_impl = "native"
            plug = None
            if name in (PLUG, HEAD):
                plug = distill(
                    plain,
                    DistillSettings(fused_head="on" if name == HEAD else "off"),
                    teacher=training.teacher,
                )
            forward = plug or plain
            training.teacher.restart()
            try:
                for _ in range(WARMUPS):
                    norm = training.step(forward)
                clock.start_memory()
                norm = training.step(forward)
                times.step_bytes = clock.extra_bytes()
                for _ in range(steps):
                    clock.prepare()
                    start = clock.mark()
                    norm = training.step(forward)
                    times.seconds.append(clock.seconds(start, clock.mark()))
                times.loss, times.gradient_norm = float(last["losses"].float().mean()), norm
            finally:
                if plug is not None:
                    plug.close()
                clock.clean()
    return summary(shape, micro_batch, engine, training.parameters, found)


def summary(shape: Shape, micro_batch: int, engine: bool, parameters: int, found: dict[str, Times]) -> dict:
    plain = median(found[PLAIN].seconds)
    numbers = [number for times in found.values() for number in (times.loss, times.gradient_norm)]
    apart = [
        abs(getattr(found[HEAD], name) / getattr(found[PLUG], name) - 1) for name in ("loss", "gradient_norm")
    ]
    return {
        "passed": all(map(math.isfinite, numbers)) and max(apart) <= LARGEST_DIFFERENCE,
        "head_differs_by": dict(zip(("loss", "gradient_norm"), apart, strict=True)),
        "shape": asdict(shape),
        "micro_batch": micro_batch,
        "parameters": parameters,
        "layers_of": "Transformer Engine" if engine else "megatron-core",
        "answer_bytes": 2 * micro_batch * shape.sequence * shape.vocab,
        "step_ms": {name: 1e3 * median(times.seconds) for name, times in found.items()},
        "longer_percent": {name: 100 * (median(t.seconds) / plain - 1) for name, t in found.items()},
        "losses": {name: asdict(times) for name, times in found.items()},
    }


def lines(result: dict) -> str:
    """The printed lines."""
    title = f"{result['parameters'] / 1e9:.2f} B parameters, layers of {result['layers_of']}"
    rows = [f"{title} {'median ms':>10} {'longer':>8} {'step MiB':>9} {'loss':>8}"]
    for name, times in result["losses"].items():
        rows.append(
            f"{name:<{len(title)}} {result['step_ms'][name]:>10.1f} {result['longer_percent'][name]:>+7.1f}% "
            f"{times['step_bytes'] / 2**20:>9.0f} {times['loss']:>8.4f}"
        )
    return "\n".join(
        [*rows, *([] if result["passed"] else ["WRONG: see losses, gradient norms and head_differs_by"])]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("layers", "hidden", "feed_forward", "heads", "groups", "vocab", "sequence"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(SHAPE, name))
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = vars(parser.parse_args())
    path, micro_batch = options.pop("json"), options.pop("micro_batch")
    if importlib.util.find_spec("megatron") is None:
        result: dict = {"passed": None, "how": "megatron-core is not installed"}
    elif not torch.cuda.is_available():
        result = {"passed": None, "how": f"torch {torch.__version__} finds no usable GPU"}
    else:
        engine = importlib.util.find_spec("transformer_engine") is not None
        shape = Shape(**options, gated=True, tied=True)
        with one_rank():
            result = measure(shape, micro_batch, engine, CudaClock(), bias_activation_fusion=True)
    if path is not None:
        path.write_text(json.dumps(result, indent=1))
    print(result["how"] if result["passed"] is None else lines(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
