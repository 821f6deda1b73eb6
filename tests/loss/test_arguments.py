"""Wrong arguments: one sentence that names the argument, what was expected and what was got."""

from __future__ import annotations

import subprocess
import sys

import kernels_under_test  # noqa: F401  before vcrd's operators
import pytest
import torch

import vcrd

STUDENT, TEACHER = torch.zeros(3, 8), torch.zeros(3, 8)
LABELS = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "sentence", "arguments"),
    [
        (TypeError, "student_logits: expected a tensor, got list", dict(student_logits=[1.0])),
        (
            TypeError,
            "student_logits: expected float32, bfloat16 or float16, got torch.float64",
            dict(student_logits=STUDENT.double()),
        ),
        (
            TypeError,
            "teacher_logits: expected float32, bfloat16, float16 or uint8 codes, got torch.int64",
            dict(teacher_logits=TEACHER.long()),
        ),
        (
            TypeError,
            "student_logits: expected float32, bfloat16 or float16, got torch.uint8",
            dict(student_logits=STUDENT.byte()),
        ),
        (
            TypeError,
            "teacher_logits.row_max: expected float32, got torch.float64",
            dict(teacher_logits=vcrd.DenseLogits(TEACHER, torch.ones(3).double())),
        ),
        (
            ValueError,
            r"teacher_logits.row_max: expected the logits' leading shape \[3\], got \[2\]",
            dict(teacher_logits=vcrd.DenseLogits(TEACHER, torch.ones(2))),
        ),
        (ValueError, "student_logits: expected shape", dict(student_logits=torch.tensor(1.0))),
        (
            ValueError,
            r"teacher_logits: expected the student's leading shape \[3\], got \[2\]",
            dict(teacher_logits=TEACHER[:2]),
        ),
        (ValueError, r"labels: expected the logits' leading shape \[3\], got \[2\]", dict(labels=LABELS[:2])),
        (TypeError, "labels: expected integers, got torch.float32", dict(labels=LABELS.float())),
        (ValueError, "labels: expected ids below vocab_size 8, got 8", dict(labels=LABELS + 8)),
        (ValueError, "labels: needed by validity 'label', got None", dict(labels=None)),
        (
            ValueError,
            "labels: needed by ce_weight 1.0, got None",
            dict(labels=None, validity="margin", ce_weight=1.0),
        ),
        (
            ValueError,
            r"mask: expected the logits' leading shape \[3\], got \[3, 1\]",
            dict(mask=torch.ones(3, 1)),
        ),
        (ValueError, "divergence: expected one of forward_kl, .* got 'kl'", dict(divergence="kl")),
        (ValueError, "temperature: expected a finite number above 0, got 0", dict(temperature=0)),
        (TypeError, "temperature: expected a number, got str", dict(temperature="1")),
        (ValueError, r"alpha: expected a number in \[0, 1\), got 1.0", dict(alpha=1.0)),
        (ValueError, r"beta: expected a number in \(0, 1\), got 0", dict(beta=0)),
        (ValueError, "vocab_size: expected 1 to the student's 8 columns, got 9", dict(vocab_size=9)),
        (ValueError, "vocab_size: expected an integer of at least 1 or None, got 0", dict(vocab_size=0)),
        (TypeError, "vocab_size: expected an integer or None, got float", dict(vocab_size=8.0)),
        (
            ValueError,
            "vocab_size: needed where student and teacher are padded differently",
            dict(teacher_logits=torch.zeros(3, 9)),
        ),
        (
            ValueError,
            "teacher_logits: expected at least 8 columns on rank 0, .* got 7",
            dict(teacher_logits=torch.zeros(3, 7), vocab_size=8),
        ),
        (ValueError, "validity: expected one of label, .* got 'best'", dict(validity="best")),
        (TypeError, "sharpnes: expected an argument .* or a field of LossConfig", dict(sharpnes=2.0)),
        (TypeError, "config: expected a LossConfig or None, got dict", dict(config={})),
        (ValueError, "ce_weight: expected a finite number, got inf", dict(ce_weight=float("inf"))),
        (TypeError, "skip_invalid_teacher: expected True or False, got 1", dict(skip_invalid_teacher=1)),
        (ValueError, "floor: expected a finite number of at least 0 or None, got -1", dict(floor=-1)),
        (TypeError, "sharpness: expected a number or None, got str", dict(sharpness="4")),
        (ValueError, "normalization: expected one of none, mean, mass, got 'sum'", dict(normalization="sum")),
        (ValueError, "weighting: expected one of sigmoid, gap, got 'gate'", dict(weighting="gate")),
        (ValueError, r"steps: expected the tokens' shape \[3\], got \[2\]", dict(steps=LABELS[:2])),
        (TypeError, "steps: expected integers, got torch.float32", dict(steps=torch.zeros(3))),
        (
            TypeError,
            "student_validity: expected a tensor, got NoneType",
            dict(validity="scores", teacher_validity=torch.ones(3)),
        ),
        (
            ValueError,
            r"teacher_validity: expected values in \[0, 1\], got 2 to 2",
            dict(validity="scores", student_validity=torch.ones(3), teacher_validity=torch.full((3,), 2.0)),
        ),
        (
            ValueError,
            r"teacher_validity: expected the tokens' shape \[3\], got \[2\]",
            dict(validity="scores", student_validity=torch.ones(3), teacher_validity=torch.ones(2)),
        ),
        (
            ValueError,
            "student_validity: expected a value for each step up to 2, got 2",
            dict(
                validity="scores",
                student_validity=torch.ones(2),
                teacher_validity=torch.ones(3),
                steps=torch.arange(3),
            ),
        ),
        (
            ValueError,
            "student_validity: expected none unless validity is 'scores'",
            dict(student_validity=torch.ones(3)),
        ),
        (
            TypeError,
            r"validity: expected the callable to return \(student, teacher\), got Tensor",
            dict(validity=lambda stats: stats.divergence),
        ),
        (
            ValueError,
            "validity: the callable's teacher validity: expected the tokens' shape",
            dict(validity=lambda stats: (stats.divergence.exp().clamp(max=1), torch.ones(1))),
        ),
    ],
)
def test_one_sentence_names_the_argument(error, sentence, arguments):
    given = dict(student_logits=STUDENT, teacher_logits=TEACHER, labels=LABELS) | arguments
    with pytest.raises(error, match=sentence) as caught:
        vcrd.validity_calibrated_kl(given.pop("student_logits"), given.pop("teacher_logits"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.cpu_kernels
def test_a_missing_extension_is_one_clear_error_on_first_use(tmp_path):
    """Not on `import vcrd`, whose other parts work, and never a slow path instead."""
    script = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "vcrd._C":
            raise ImportError("no such file")
sys.meta_path.insert(0, Absent())
import vcrd, vcrd.link, vcrd.loss.reference
try:
    vcrd.validity_calibrated_kl
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "vcrd's compiled extension vcrd._C is missing" in done.stdout and "pip install" in done.stdout


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("names", ["DIVERGENCES", "STATISTICS"])
def test_an_extension_that_counts_otherwise_is_refused(names):
    """Divergences and statistics go by their numbers: of another order each would be a wrong number in silence."""
    script = f"""
from vcrd.loss import ops
ops.{names} = ops.{names}[::-1]
try:
    import vcrd.loss.divergence
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (
        done.stdout.startswith("vcrd._C: expected the divergences") and "build the extension" in done.stdout
    )
