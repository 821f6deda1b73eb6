"""Imports of the fork server. Importing Megatron takes seconds, torch two, and a fork of both a tenth."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import kernels_under_test
import torch.distributed  # noqa: F401

import vcrd.link
import vcrd.loss.api  # noqa: F401

_before = logging.root.level, list(logging.root.handlers)
# Emulated kernels need only the loss. CUDA does not work in forks of a process that has looked for a GPU, and the
# import of Megatron may look for one.
GPU = any(Path("/dev").glob("nvidia[0-9]*"))
if not (kernels_under_test.EMULATED or GPU) and importlib.util.find_spec("megatron"):
    from vcrd.megatron import cpu

    with cpu.on_cpu():
        import megatron.core.distributed
        import megatron.core.models.gpt
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401
        import safetensors  # noqa: F401

        if importlib.util.find_spec("megatron.training"):
            import megatron.training.training  # noqa: F401

# Importing Megatron's training loop configures the root logger. Only a script that runs this loop is to have that.
SCRIPT_LOGGING = logging.root.level, list(logging.root.handlers)
logging.root.setLevel(_before[0])
logging.root.handlers[:] = _before[1]
