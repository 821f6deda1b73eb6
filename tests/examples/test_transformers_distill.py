"""The loop without Megatron: its first loss and gradients equal the reference, and the loss falls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from examples import transformers_distill as example
from vcrd.integrations.transformers import DistillationLoss
from vcrd.loss import reference

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "transformers_distill.py"


def test_the_first_batch_equals_the_reference():
    torch.manual_seed(1)
    student, teacher = example.load(None, 16).train(), example.load(None, 32).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(128, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0  # padded at its end
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = torch.where(mask == 1, ids, -100)
    loss = example.mean_loss(DistillationLoss(student, teacher), student, {**batch, "labels": labels})
    found = torch.autograd.grad(loss, list(student.parameters()))

    p, q = (model(**batch).logits[:, :-1].double() for model in (teacher, student))
    stats = reference.statistics(
        q, p.detach(), ids[:, 1:], vocab_size=128, mask=mask[:, 1:], name="forward_kl"
    )
    weight, _ = reference.weights(*reference.log_validities(stats, "label"), sharpness=4.0, mask=mask[:, 1:])
    truth = (weight.detach() * stats["divergence"]).sum() / mask[:, 1:].sum()
    torch.testing.assert_close(loss.double(), truth, atol=1e-6, rtol=1e-5)
    for gradient, expected in zip(found, torch.autograd.grad(truth, list(student.parameters())), strict=True):
        scale = expected.abs().max()
        assert scale > 0
        torch.testing.assert_close(gradient / scale, expected.to(gradient) / scale, atol=1e-4, rtol=0)


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def losses_of(done: subprocess.CompletedProcess) -> list[float]:
    assert done.returncode == 0, done.stderr
    return [float(value) for value in re.findall(r"loss ([0-9.]+)", done.stdout)]


def test_it_runs_without_options_and_the_loss_falls():
    losses = losses_of(run())
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def test_models_from_folders_learn_from_a_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{n}" for n in range(128)]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    teacher = example.load(None, 32)
    teacher.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    text = tmp_path / "text"
    text.write_text(" ".join(words * 3))
    losses = losses_of(run("--student", str(tmp_path), "--teacher", str(tmp_path), "--text", str(text)))
    assert len(losses) == 3
    assert all(loss < 1e-3 for loss in losses), "a student that equals its teacher has nothing to learn"
