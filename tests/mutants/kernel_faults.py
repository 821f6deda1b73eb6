"""Faults in the kernels: those that the CPU runs, then those that only a GPU runs."""

from __future__ import annotations

from faults import KERNELS, Fault

_LANES = "tests/loss/test_lanes.py"
_ROWS = "tests/loss/test_rows.py"
_DIVERGENCE = "tests/loss/test_divergence.py"
_ENCODE = "tests/loss/test_encode.py"
_INFINITY = "tests/loss/test_minus_infinity.py"
_SHARDED = "tests/loss/test_sharded.py"


def _on_cpu(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, KERNELS, f"csrc/{file}", old, new, tests)


def _on_gpu(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, KERNELS, f"csrc/{file}", old, new, tests, emulated=True)


FAULTS = [
    _on_cpu(
        "the entropy's sum of a shard is not moved to the row's maximum",
        "merge.h",
        "row.teacher_moment += teacher_scale * (part.teacher_moment + teacher_shift * part.teacher_sum);",
        "row.teacher_moment += teacher_scale * part.teacher_moment;",
        *(_SHARDED, "-k", "reference and 2"),
    ),
    _on_cpu(
        "of equal maxima in two shards the later one is the action",
        "merge.h",
        "if (part.student_max > row.student_max)",
        "if (part.student_max >= row.student_max)",
        f"{_ROWS}::test_two_shards_are_one_row",
    ),
    _on_cpu(
        "a rising maximum moves the cross term by the sum at temperature 1",
        "cpu/statistics.h",
        "forward_cross += rise * teacher_tempered;",
        "forward_cross += rise * teacher;",
        *(_LANES, "-k", "rise"),
    ),
    _on_cpu(
        "zeros for the padding are counted in elements, not in bytes",
        "cpu/gradient.h",
        "(p.gradient_columns - p.tokens.columns) * sizeof(S));",
        "p.gradient_columns - p.tokens.columns);",
        *(_DIVERGENCE, "-k", "reference and True"),
    ),
    _on_cpu(
        "a row of -inf alone is encoded relative to its maximum",
        "cpu/encode.h",
        "const float maximum = p.maxima[row] == -INFINITY ? 0.0f : p.maxima[row];",
        "const float maximum = p.maxima[row];",
        *(_ENCODE, "-k", "range"),
    ),
    _on_cpu(
        "ties are rounded away from zero, not to even",
        "elementwise.h",
        "(magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13",
        "(magnitude - 0x38000000u + 0x1000u) >> 13",
        *(_DIVERGENCE, "-k", "nearest"),
    ),
    _on_cpu(
        "what lies behind a row's end counts as logits of 0",
        "cpu/lanes.h",
        "store_pair<false>({all_lanes(-INFINITY), all_lanes(-INFINITY)}, columns);",
        "store_pair<false>({all_lanes(0.0f), all_lanes(0.0f)}, columns);",
        *(_LANES, "-k", "every_length"),
    ),
    _on_cpu(
        "rows of odd lengths are written past the caches as if they were aligned",
        "cpu/encode.h",
        "(reinterpret_cast<uintptr_t>(p.codes) | row_bytes) % kAligned == 0;",
        "reinterpret_cast<uintptr_t>(p.codes) % kAligned == 0;",
        *(_ENCODE, "-k", "caches"),
    ),
    _on_cpu(
        "probability that the student lacks is known of the last shard alone",
        "merge.h",
        "fmaxf(row.teacher_without_student, part.teacher_without_student);",
        "part.teacher_without_student;",
        *(_INFINITY, "-k", "group and 2"),
    ),
    _on_gpu(
        "the gradient's first columns are written beside the row",
        "cuda/gradient.cuh",
        "if (column + j >= 0 && column + j < tiling.columns) out[column + j]",
        "if (column + j < tiling.columns) out[column + j]",
        f"{_ROWS}::test_every_number_of_columns_up_to_70",
    ),
    _on_gpu(
        "a label in the first columns of a part is not seen",
        "cuda/statistics.cuh",
        "if (vector >= begin && vector < end) {",
        "if (vector > begin && vector < end) {",
        f"{_ROWS}::test_every_number_of_columns_up_to_70",
    ),
    _on_gpu(
        "a lane's references may lie as far below its logits at a low temperature as at 1",
        "cuda/statistics.cuh",
        "kTempered ? kSlack * fminf(1.0f, 1.0f / inverse_temperature) : kSlack;",
        "kSlack;",
        *(_INFINITY, "-k", "low_temperature"),
    ),
    _on_gpu(
        "the first warp reads the others' sums without waiting for them",
        "cuda/statistics.cuh",
        "    __syncthreads();\n    if (group.warp() != 0) return;",
        "    if (group.warp() != 0) return;",
        *(f"{_ROWS}::test_few_rows_of_many_columns", "-k", "forward_kl"),
    ),
    _on_gpu(
        "parts of a row's mixture are stored row by row and read part by part",
        "cuda/mixture.cuh",
        "p.sums + 2 * (group.split * p.tokens.rows + group.row);",
        "p.sums + 2 * (group.row * grid.splits + group.split);",
        *(f"{_ROWS}::test_few_rows_of_many_columns", "-k", "jsd"),
    ),
    _on_gpu(
        "two digits of a coefficient changed places",
        "cuda/even_mixture.cuh",
        "p = p * t + 7.213494778e-1f;",
        "p = p * t + 7.231494778e-1f;",
        *(f"{_ROWS}::test_few_rows_of_many_columns", "-k", "jsd"),
    ),
    _on_gpu(
        "the last columns of a row that its parts do not divide are left out",
        "cuda/warp_group.cuh",
        "int each = splits == 1 ? vectors : (vectors + splits - 1) / splits;",
        "int each = splits == 1 ? vectors : vectors / splits;",
        *(f"{_ROWS}::test_few_rows_of_many_columns", "-k", "forward_kl"),
    ),
    _on_gpu(
        "a misaligned row is read in whole vectors up to its very end",
        "cuda/row.cuh",
        "const int margin = past_alignment ? kColumns : 0, column",
        "const int margin = 0, column",
        f"{_ROWS}::test_rows_that_end_with_their_memory",
    ),
    _on_gpu(
        "of a row with 2^n warps n are asked for their maximum",
        "cuda/encode.cu",
        "for (int i = 1; i < grid.warps(); ++i) maximum = fmaxf(maximum, of_warps[threadIdx.x / 32 + i]);",
        "for (int i = 1; i < grid.warps_log2; ++i) maximum = fmaxf(maximum, of_warps[threadIdx.x / 32 + i]);",
        *(_ENCODE, "-k", "formula and dtype0"),
    ),
    _on_gpu(
        "a label's gradient is put at its id, not at its column in this shard",
        "cuda/gradient.cuh",
        "p.tokens.labels[group.row] - p.tokens.first_column : -1;",
        "p.tokens.labels[group.row] : -1;",
        f"{_ROWS}::test_two_shards_are_one_row",
    ),
    _on_gpu(
        "what is no number has whatever code its bits give",
        "elementwise.h",
        "d = d < kSqrt8Range ? d : kSqrt8Range;  // a NaN becomes the range: codes have no NaN",
        "d = d > kSqrt8Range ? kSqrt8Range : d;",
        *(_ENCODE, "-k", "range"),
    ),
]
