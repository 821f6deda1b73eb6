"""Megatron-Core on CPU and gloo: the calls that assume a CUDA device are redirected while a context is open.

Megatron's own layers, pipeline schedules, data-parallel wrapper and optimizers run unchanged. Only `device="cuda"`,
`.cuda()`, streams, events, random states and a few type names are redirected to the CPU.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import runpy
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vcrd.megatron import bridge_on_cpu

# If these can be imported, Megatron uses their norms and optimizers, which need a GPU, even with `local` layers.
HIDDEN_PACKAGES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "flash_attn",
    "flash_attn_3",
)
_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
_TENSOR_TYPES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Lets Megatron-Core run on CPU and gloo inside this block; outside it torch and Megatron are as before.

    Build models, initialize `parallel_state` and train inside the block, in the thread that opened it. The
    process group must be gloo. In Megatron's configuration choose the local layer specification,
    `use_cpu_initialization`, `persist_layer_norm=False` and no fusions. Megatron's local norm does not support sequence
    parallelism, and its local attention no context parallelism: for these bring your own. Megatron modules that are
    first imported inside the block keep their torch norms after it.

    Raises RuntimeError if Transformer Engine or apex is already imported, because they must be hidden first.
    """
    with contextlib.ExitStack() as stack:
        _hide_packages(stack)
        _set_environment(stack)
        # Megatron is imported before torch.cuda is touched: names it imports from there stay the real ones.
        rng = importlib.import_module("megatron.core.tensor_parallel.random")
        bridge_on_cpu.keep_compiled_helpers(stack)
        bridge_on_cpu.install(stack)
        for owner, names in _stand_ins(rng):
            for name, value in names.items():
                _replace(stack, owner, name, value)
        stack.enter_context(_Redirect())
        yield


def run_script(arguments: list[str]) -> None:
    """Runs `arguments[0]`, an unmodified script, as the main program and on the CPU: `python -m vcrd.megatron.cpu`.

    arguments: the script's path and its own arguments. Raises SystemExit with a message if no script is named.
    """
    if not arguments or not os.path.isfile(arguments[0]):
        got = repr(arguments[0]) if arguments else "nothing"
        raise SystemExit(f"vcrd.megatron.cpu: expected a script and its arguments, got {got}")
    before = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
    try:
        with on_cpu():
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.argv, sys.path[0] = before


def enable() -> contextlib.ExitStack:
    """Opens `on_cpu` without a `with` block, for the top of a script; `.close()` of the result undoes it.

    Raises RuntimeError as `on_cpu` does.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(on_cpu())
    atexit.register(stack.close)  # keeps the stack alive if the caller drops it
    return stack


class _Redirect(TorchFunctionMode):
    """Replaces a CUDA device in a torch call by the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in _IDENTITY:
            return args[0]
        if func is torch.distributed.all_to_all_single:
            # Megatron's dispatcher of experts turns counts that are on a GPU into numbers, and only these.
            kwargs = {
                name: value.tolist() if name in _SPLIT_SIZES and isinstance(value, torch.Tensor) else value
                for name, value in kwargs.items()
            }
        if func is torch.Tensor.to:
            args = (args[0], *(torch.device("cpu") if _is_cuda(value) else value for value in args[1:]))
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare this name with torch.cuda.FloatTensor and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


_IDENTITY = (torch.Tensor.cuda, torch.Tensor.pin_memory)
_SPLIT_SIZES = ("output_split_sizes", "input_split_sizes")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _Stream:
    """A stream whose work is always done, as on a CPU."""

    device_index = 0
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None


class _Event:
    """An event that has always happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _random_states() -> dict[str, Any]:
    """The functions of torch.cuda.random, on the CPU's generator."""

    def get_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(state)

    def seed_generator(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return {
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": seed_generator,
        "manual_seed_all": seed_generator,
        "initial_seed": torch.initial_seed,
    }


def _devices(memory: int) -> dict[str, Any]:
    properties = types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=memory, multi_processor_count=os.cpu_count(), warp_size=1
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": _zero,
        "set_device": _nothing,
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (0, 0),
        "default_generators": (torch.default_generator,),
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "init": _nothing,
    }


def _streams() -> dict[str, Any]:
    stream = _Stream()
    return {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": _nothing,
        "stream": lambda stream=None: contextlib.nullcontext(),
        "device": lambda device=None: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }


def _memory_counters(memory: int) -> dict[str, Any]:
    return {
        "mem_get_info": lambda device=None: (memory, memory),
        "memory_stats": lambda device=None: dict.fromkeys(_MEMORY_STATS, 0),
        "device_memory_used": _zero,
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "reset_peak_memory_stats": _nothing,
    }


def _stand_ins(rng: types.ModuleType) -> list[tuple[Any, dict[str, Any]]]:
    """(object, {attribute: stand-in}): everything that is replaced while the block is open."""
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    memory = page * (os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**20)
    states, streams, counters = _random_states(), _streams(), _memory_counters(memory)
    tensors = {f"{kind}Tensor": getattr(torch, f"{kind}Tensor") for kind in _TENSOR_TYPES}
    run_backward = torch.autograd._engine_run_backward

    def redirected_backward(*args: Any, **kwargs: Any) -> Any:
        # torch disables a function mode inside a call that went through it, and so in a whole backward.
        with _Redirect():
            return run_backward(*args, **kwargs)

    loader_init = torch.utils.data.DataLoader.__init__

    def init_loader(self: Any, *args: Any, **kwargs: Any) -> None:
        loader_init(self, *args, **{**kwargs, "pin_memory": False})

    replaced = [
        (torch.cuda, {**states, **_devices(memory), **streams, **counters, **tensors}),
        (torch.cuda.random, states),
        (torch.cuda.memory, counters),
        (torch.cuda.graphs, {"is_current_stream_capturing": streams["is_current_stream_capturing"]}),
        (torch.cuda.nvtx, {"range_push": _zero, "range_pop": _zero}),
        (torch.autograd, {"_engine_run_backward": redirected_backward}),
        (torch.utils.data.DataLoader, {"__init__": init_loader}),
        # Not in the function mode: torch would refuse the stand-in stream before it calls the mode.
        (torch.Tensor, {"record_stream": _nothing}),
        (
            rng,
            {
                "_get_cuda_rng_state": lambda device="cuda", clone=False, graph_safe=False: (
                    torch.get_rng_state()
                )
            },
        ),
        (rng, {"_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)}),
    ]
    if hasattr(torch, "accelerator"):
        # torch's optimizers ask this stream from 2.15 on.
        stream = streams["current_stream"]
        accelerator = {"current_device_index": _zero, "synchronize": _nothing, "current_stream": stream}
        replaced.append((torch.accelerator, accelerator))
    return replaced


_MEMORY_STATS = (
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "reserved_bytes.all.current",
    "reserved_bytes.all.peak",
    "num_alloc_retries",
    "num_ooms",
)


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    if before is missing:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)


def _hide_packages(stack: contextlib.ExitStack) -> None:
    loaded = [name for name in HIDDEN_PACKAGES if sys.modules.get(name) is not None]
    if loaded:
        raise RuntimeError(
            f"enter vcrd.megatron.cpu before {loaded[0]} is imported: it can no longer be hidden"
        )
    for name in HIDDEN_PACKAGES:
        if name not in sys.modules:
            # Python's import system reads None as "not importable".
            sys.modules[name] = None  # type: ignore[assignment]
            stack.callback(sys.modules.pop, name, None)


def _set_environment(stack: contextlib.ExitStack) -> None:
    for name, value in _ENVIRONMENT.items():
        before = os.environ.get(name)
        os.environ[name] = value
        if before is None:
            stack.callback(os.environ.pop, name, None)
        else:
            stack.callback(os.environ.__setitem__, name, before)
    # Megatron's compiled helpers would take minutes to build on a CPU. Dynamo reads the variable above when it is
    # imported, so its switch must be restored too. If this import is the first, its value before was False.
    imported = "torch._dynamo.config" in sys.modules
    config = importlib.import_module("torch._dynamo.config")
    stack.callback(setattr, config, "disable", config.disable if imported else False)
    config.disable = True


if __name__ == "__main__":
    run_script(sys.argv[1:])
