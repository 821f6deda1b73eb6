"""Megatron on CPU: what is redirected inside the context, that nothing is outside, that clipping and TE behave."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo.config
from worlds import World, run_worlds

from vcrd.megatron import cpu


def test_cuda_answers_for_the_cpu_inside():
    with cpu.on_cpu():
        assert torch.cuda.is_available() and torch.cuda.current_device() == 0
        made = [
            torch.zeros(2, device="cuda"),
            torch.zeros(2, device=torch.cuda.current_device()),
            torch.empty(2, device=torch.device("cuda", 0), pin_memory=True),
            torch.ones(2).cuda(non_blocking=True),
            torch.ones(2).to("cuda:0"),
            torch.ones(2).to(device="cuda"),
            torch.ones(2).to(0),
            torch.nn.Linear(2, 2).cuda().weight,
            torch.cuda.FloatTensor([1.0]),
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert torch.ones(1).to(torch.float64).dtype == torch.float64
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.int64).dtype == torch.int64
        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.current_stream())
            event.record(stream)
            torch.ones(1).record_stream(stream)
        assert event.query() and event.elapsed_time(event) == 0.0
        loader = torch.utils.data.DataLoader([1, 2], pin_memory=True)
        assert [int(batch) for batch in loader] == [1, 2]


class MadeInBackward(torch.autograd.Function):
    """Allocates where Megatron's layers do under sequence parallelism: on the current device, inside backward."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.ones(len(gradient), device=torch.cuda.current_device())


def test_cuda_answers_for_the_cpu_inside_a_backward():
    with cpu.on_cpu():
        tensor = torch.ones(2, requires_grad=True)
        MadeInBackward.apply(tensor).sum().backward()
        assert tensor.grad.tolist() == [2, 2]
        torch.autograd.backward(MadeInBackward.apply(tensor).sum())
        assert tensor.grad.tolist() == [4, 4]
        (gradient,) = torch.autograd.grad(MadeInBackward.apply(tensor).sum(), tensor)
        assert gradient.tolist() == [2, 2]


def test_random_states_are_the_cpus():
    with cpu.on_cpu():
        torch.cuda.manual_seed(5)
        state, first = torch.cuda.get_rng_state(), torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


def test_everything_is_as_before_outside():
    modules = (
        torch.cuda,
        torch.cuda.random,
        torch.cuda.memory,
        torch.cuda.graphs,
        torch.cuda.nvtx,
        torch.accelerator,
        torch.autograd,
    )

    def snapshot():
        hidden = {name: sys.modules.get(name, "absent") for name in cpu.HIDDEN_PACKAGES}
        loader = torch.utils.data.DataLoader.__init__
        return [dict(vars(module)) for module in modules], hidden, loader, torch._dynamo.config.disable

    import megatron.core.tensor_parallel.random as rng

    before, functions = snapshot(), (rng._get_cuda_rng_state, rng._set_cuda_rng_state)
    opened = cpu.enable()
    with cpu.on_cpu():  # once more inside, as a library and its caller may
        pass
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    opened.close()
    assert snapshot() == before
    assert functions == (rng._get_cuda_rng_state, rng._set_cuda_rng_state)
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_transformer_engine_and_apex_are_hidden_from_megatron(tmp_path):
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    script = """
        import sys
        from vcrd.megatron import cpu
        with cpu.on_cpu():
            from megatron.core.models.gpt import GPTModel
            from megatron.core.transformer.torch_norm import WrappedTorchNorm
            import megatron.core.transformer.transformer_block as block
            assert block.LayerNormImpl is WrappedTorchNorm
        assert "transformer_engine" not in sys.modules and "apex" not in sys.modules
    """
    path = [str(tmp_path), *filter(None, sys.path)]
    environment = {"PYTHONPATH": ":".join(path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_already_cannot_be_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", type(sys)("transformer_engine"))
    with pytest.raises(RuntimeError, match="before transformer_engine is imported"), cpu.on_cpu():
        raise AssertionError("must not open")


def train(steps: int) -> list[float]:
    """Losses of a tiny model over tensor x pipeline ranks, with clipping; empty before the last stage."""
    import jobs
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    part = jobs.model(jobs.STUDENT, seed=1)
    part.config.finalize_model_grads_func = finalize
    wrapped = DistributedDataParallel(
        part.config, DistributedDataParallelConfig(use_distributed_optimizer=True), part
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.5, use_distributed_optimizer=True), [wrapped]
    )
    losses: list[float] = []
    seen: list[torch.Tensor] = []
    data = jobs.batches(2)
    for _ in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        seen.clear()
        get_forward_backward_func()(
            forward_step_func=jobs.plain_forward_step(seen),
            data_iterator=iter(data),
            model=[wrapped],
            num_microbatches=2,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        updated, norm, _ = optimizer.step()
        assert updated and norm > 0
        if parallel_state.is_pipeline_last_stage():
            kept = [(loss * batch["loss_mask"]).sum() for loss, batch in zip(seen, data, strict=True)]
            losses.append(float(sum(kept)))
    return losses


def test_training_with_schedules_clipping_and_distributed_optimizer_does_not_depend_on_the_layout():
    ((alone,), parallel) = run_worlds(
        World(train, arguments=(4,)), World(train, 4, tensor=2, pipeline=2, arguments=(4,))
    )
    assert alone[-1] < alone[0]
    assert parallel[0] == parallel[1] == []
    for rank in parallel[2:]:
        assert rank == pytest.approx(alone, rel=2e-4)
