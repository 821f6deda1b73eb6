"""The program that `make gpu-check` runs under compute-sanitizer: each divergence on a few rows.

The rows begin and end within a 16-byte vector, and one of them is masked. Kernels of torch do not count.
"""

from __future__ import annotations

import torch

import vcrd
from vcrd.loss.config import DIVERGENCES


def logits(dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(5, 1037, device=device).to(dtype)[:, 3:]


def main(device: str = "cuda") -> None:
    labels, mask = torch.arange(5, device=device), torch.tensor([1, 1, 0, 1, 1], device=device)
    for divergence in DIVERGENCES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            student = logits(dtype, device).requires_grad_()
            stats = vcrd.vocab_parallel_divergence(
                *(student, logits(torch.bfloat16, device), labels),
                divergence=divergence,
                mask=mask,
                temperature=2.0,
            )
            torch.autograd.grad((stats.divergence + stats.cross_entropy).sum(), student)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
