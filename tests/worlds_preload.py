"""What every process of a test's world imports, imported once by the server that they are forked from."""

from __future__ import annotations

from vcrd.megatron import cpu

with cpu.on_cpu():
    import megatron.core.distributed  # noqa: F401
    import megatron.core.models.gpt  # noqa: F401
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import megatron.core.optimizer  # noqa: F401
    import megatron.core.pipeline_parallel  # noqa: F401
    import safetensors  # noqa: F401
