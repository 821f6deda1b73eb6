"""What the fork server imports. Megatron takes seconds to import, torch two, and a fork of both a tenth of one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import kernels_under_test
import torch.distributed  # noqa: F401

import vcrd.link
import vcrd.loss.api  # noqa: F401

# Emulated kernels are for the loss alone. A process that has looked for a GPU has no working CUDA in its forks, and
# Megatron may look for one while it is imported.
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
