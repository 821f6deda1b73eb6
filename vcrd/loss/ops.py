"""Loads the compiled extension and gives its operators fake kernels, so that torch.compile can trace them.

The operators work on [tokens, vocabulary shard] matrices and are documented by `csrc/params.h`. They have no autograd
of their own: `vcrd.loss.divergence` is the one autograd function above them.
"""

from __future__ import annotations

import torch
from torch import library

from vcrd import build_record

# Loading an extension of another torch may crash, so its record is compared first.
if reason := build_record.refusal(build_record.read(), torch.__version__, torch.version.cuda):
    raise ImportError(reason)
try:
    from vcrd import _C
except ImportError as error:
    raise ImportError(
        "vcrd's compiled extension vcrd._C is missing or was built against another torch "
        f"(this one is {torch.__version__}): build it with `pip install --no-build-isolation -e .` in the "
        f"checkout. The loader said: {error}"
    ) from error

# What the extension calls its divergences and the rows of its merged statistics, in the order of their numbers, and
# where Python finds columns of the partial statistics and of the constants.
DIVERGENCES: tuple[str, ...] = _C.divergences
STATISTICS: tuple[str, ...] = _C.statistics
PARTIAL_COLUMNS: dict[str, int] = _C.partial_columns
CONSTANT_COLUMNS: dict[str, int] = _C.constant_columns
PARTIAL_FLOATS: int = _C.partial_floats
CONSTANT_FLOATS: int = _C.constant_floats

row_statistics = torch.ops.vcrd.row_statistics
merge_statistics = torch.ops.vcrd.merge_statistics
mixture_sums = torch.ops.vcrd.mixture_sums
gradient = torch.ops.vcrd.gradient
gradient_ = torch.ops.vcrd.gradient_
row_maxima = torch.ops.vcrd.row_maxima
encode = torch.ops.vcrd.encode
mix_ = torch.ops.vcrd.mix_


@library.register_fake("vcrd::row_statistics")
def _(student, teacher, teacher_max, labels, mask, temperature, columns, first_column, divergence):
    return student.new_empty((student.shape[0], PARTIAL_FLOATS), dtype=torch.float32)


@library.register_fake("vcrd::merge_statistics")
def _(partials, labels, mask, temperature, divergence):
    rows = partials.shape[1]
    return (
        partials.new_empty((len(STATISTICS), rows)),
        partials.new_empty((2, rows), dtype=torch.int64),
        partials.new_empty((rows, CONSTANT_FLOATS)),
    )


@library.register_fake("vcrd::mixture_sums")
def _(student, teacher, teacher_max, mask, constants, temperature, columns, divergence, mixture_weight):
    return constants.new_empty((student.shape[0], 2))


@library.register_fake("vcrd::gradient")
def _(student, *_args):
    return student.new_empty(student.shape)


@library.register_fake("vcrd::gradient_")
def _(student, *_args):
    return None


@library.register_fake("vcrd::row_maxima")
def _(logits):
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@library.register_fake("vcrd::encode")
def _(logits, maxima, codes):
    return None


@library.register_fake("vcrd::mix_")
def _(mixture, teacher, teacher_max, subtracted, first):
    return None
