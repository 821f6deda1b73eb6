"""Prints what `make gpu-check` needs before its first stage, as a line of JSON: machine and extension.

This runs in a separate process: the queue does not import torch, and an extension that crashes does not end the queue.
The queue reads the last line of the output. The first line says that the extension crashed. It stays the last line if
the extension crashes.
"""

from __future__ import annotations

import json

import torch

from benchmarks.gpu.build import reason_to_build
from machine import gpu_facts, versions


def kernels() -> str | None:
    """Why the CUDA kernels of the existing extension cannot be used; None if they ran."""
    reason = reason_to_build(torch.__version__)
    if reason is not None:
        return reason
    try:
        import vcrd

        # Fails without CUDA kernels, and with kernels for another architecture.
        logits = torch.randn(2, 64, device="cuda")
        vcrd.vocab_parallel_divergence(logits, logits.clone()).divergence.sum().item()
    except Exception as error:
        return (
            f"vcrd._C does not run on this machine: {(str(error).strip().splitlines() or [repr(error)])[0]}"
        )
    return None


def main() -> None:
    found: dict = {"torch": torch.__version__, "gpu": torch.cuda.is_available()}
    if found["gpu"]:
        found |= {"facts": gpu_facts(), "versions": versions()}
        print(json.dumps({**found, "kernels": "vcrd._C crashes the process that loads it"}), flush=True)
        found["kernels"] = kernels()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
