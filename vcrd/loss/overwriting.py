"""Whether backward may turn the student's logits into their gradient where they lie.

A gradient that is written over logits that something else still reads is a wrong gradient for that other reader. Three
things are looked at, all of them in backward: rows that share memory with each other, logits that share memory with the
teacher, and, where the caller cannot promise it, whether anything but this loss still holds the logits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def shares_memory(rows: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Whether an element of `rows` [n, columns] is also another one of them, or may be one of `others`."""
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:  # of an expanded tensor the stride is 0
        return True
    return any(other is not None and _overlap(rows, other) for other in others)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether `a` and `b` may have an element in common. Exact where both are rows at equal distances."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (first, end), (its_first, its_end) = _span(a), _span(b)
    if end <= its_first or its_end <= first:
        return False
    step = a.stride(0) * a.element_size()
    if b.dim() != 2 or b.stride(-1) != 1 or b.stride(0) * b.element_size() != step:
        return True
    width, its_width = (t.shape[1] * t.element_size() for t in (a, b))
    distance = (its_first - first) % step
    return distance < width or distance + its_width > step


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses [from, to) between which all elements lie."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def holders(rows: Tensor) -> tuple:
    """Counts of the references to the memory of `rows`, to be compared with `holders_of_a_lone_loss`.

    Called by the backward of the function that saved `rows`, and by nothing between: the count of Python's references
    includes that of each frame.
    """
    tensors = (rows,) if rows._base is None else (rows, rows._base)
    counts = [(tensor._use_count(), sys.getrefcount(tensor)) for tensor in tensors]
    return torch._C._storage_Use_Count(rows.untyped_storage()._cdata), *counts


def holders_of_a_lone_loss() -> frozenset:
    """What `holders` gives where nothing but one autograd function holds logits, whole or copied into rows.

    Empty where this torch cannot tell; then nothing is overwritten. So it is also where the counts are not the usual
    ones: under a trace or profile function, as of a debugger, which holds the variables of frames; and under hooks of
    saved tensors, as of activation offloading; and within a backward, as where activations are computed again.

    Measured in each call, in 0.2 ms. The number of references that torch takes to a saved tensor depends on its
    version, and a number that was once measured among other circumstances would be wrong ever after.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if sys.gettrace() or sys.getprofile() or hooks is None or hooks(False) is not None:
        return frozenset()
    if torch._C._current_graph_task_id() != -1:
        return frozenset()
    if not (hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return frozenset()
    found = set()
    with torch.enable_grad():
        for as_rows in (lambda made: made.view(6, 4), lambda made: made.view(6, 4).clone()):
            made = torch.ones(2, 3, 4, device="cpu", requires_grad=True) * 1
            rows = as_rows(made)
            del made
            loss = _Lone.apply(rows, found)
            del rows
            loss.backward()
    return frozenset(found)


class _Lone(torch.autograd.Function):
    """Saves its rows as the loss does, and in backward says who holds them."""

    @staticmethod
    def forward(ctx, rows, found):
        ctx.save_for_backward(rows)
        ctx.found = found
        return rows.sum()

    @staticmethod
    def backward(ctx, gradient):
        rows, *_ = ctx.saved_tensors
        ctx.found.add(holders(rows))
        return gradient.expand_as(rows), None
