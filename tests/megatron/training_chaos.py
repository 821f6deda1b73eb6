"""Real Megatron training while its teacher is killed again and again: the weights must not notice, bit for bit.

    python tests/megatron/training_chaos.py --kills 50 --steps 200

Trains a tiny student (TP 2) twice: with a teacher that is left alone, and with one that is killed, one rank or all of
them, at random moments and started anew. Exits with 0 when losses and weights are equal bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

if __name__ == "__main__":  # as pytest.ini says for pytest
    sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import jobs
from ports import free_port
from worlds import World, Worlds

from vcrd.settings import DistillSettings

MICRO_BATCHES = 2


def train(settings: DistillSettings, steps: int, checkpoint: str, stop_after: int | None) -> SimpleNamespace:
    """Trains with Megatron's optimizer; resumes where `checkpoint` exists, saves there when it stops early.

    A run that stops ends as a killed one does: without a word to the teacher.
    """
    import os

    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    model = jobs.model(jobs.STUDENT, seed=1)
    model.config.finalize_model_grads_func = finalize
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4), [wrapped])
    losses: list[torch.Tensor] = []
    plug = distill(jobs.plain_forward_step(losses), settings)
    mine = Path(f"{checkpoint}.{parallel_state.get_tensor_model_parallel_rank()}")
    first, curve = 0, []
    if mine.exists():
        state = torch.load(mine, weights_only=False)
        first, curve = state["step"], state["curve"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    data = [jobs.batches(MICRO_BATCHES, step) for step in range(steps)]
    iterator = iter([batch for step in data[first:] for batch in step])
    for step in range(first, steps):
        losses.clear()
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iterator,
            model=[wrapped],
            num_microbatches=MICRO_BATCHES,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        optimizer.step()
        curve.append(torch.cat(losses))
        Path(f"{checkpoint}.progress").write_text(str(step + 1))
        if step + 1 == stop_after:
            state = {"step": step + 1, "curve": curve, "model": model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, mine)
            os._exit(0)
    plug.close()
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if isinstance(weight, torch.Tensor):
            digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return SimpleNamespace(curve=torch.stack(curve), weights=digest.hexdigest())


def settings() -> DistillSettings:
    return DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(
        address=f"127.0.0.1:{free_port()}", timeout=60, connect_timeout=100
    )


def quiet(steps: int) -> list[SimpleNamespace]:
    chosen = settings()
    with Worlds() as worlds, TemporaryDirectory() as folder:
        student = worlds.start(World(train, 2, tensor=2, arguments=(chosen, steps, f"{folder}/quiet", None)))
        teacher = worlds.start(World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)))
        return worlds.wait(student, teacher, seconds=300)[0]


def disturbed(steps: int, kills: int, seed: int) -> list[SimpleNamespace]:
    """The student's results after that many kills, each at some moment of a step drawn at random.

    Between two kills the teacher comes back, but it may be killed again before it has joined.
    """
    chosen, dice = settings(), random.Random(seed)
    moments = sorted(dice.choices(range(steps - 1), k=kills))
    with Worlds() as worlds, TemporaryDirectory() as folder:
        progress = Path(f"{folder}/disturbed.progress")
        arguments = (chosen, steps, f"{folder}/disturbed", None)
        student = worlds.start(World(train, 2, tensor=2, arguments=arguments))
        for moment in moments:
            teacher = worlds.start(World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)))
            while int(progress.read_text() or 0 if progress.exists() else 0) < moment:
                student.check()
                time.sleep(0.001)
            time.sleep(dice.uniform(0.0, 0.05))
            teacher.kill(dice.randrange(2))
            time.sleep(dice.choice([0.0, 0.3]))
            teacher.kill()  # as a launcher ends what is left of a job
        worlds.start(World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)))
        return worlds.wait(student, seconds=600)[0]


def equal(left: list[SimpleNamespace], right: list[SimpleNamespace]) -> bool:
    return all(
        torch.equal(a.curve, b.curve) and a.weights == b.weights for a, b in zip(left, right, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    undisturbed = quiet(options.steps)
    results = disturbed(options.steps, options.kills, options.seed)
    same = equal(undisturbed, results)
    print(
        f"{options.kills} kills over {options.steps} steps: losses and weights are {'equal' if same else 'NOT equal'} "
        f"bit for bit ({results[0].weights[:16]}), {time.monotonic() - began:.0f} s"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
