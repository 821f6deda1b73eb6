"""A teacher in the student's own ranks: losses, gradients and figures are those of the same teacher over the link."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import colocated_jobs
import jobs
import pytest
import torch
from ports import free_port
from torch.distributed.checkpoint import FileSystemReader
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd.megatron import distill
from vcrd.settings import DistillSettings


def settings(**changes) -> DistillSettings:
    link = {
        "address": f"127.0.0.1:{free_port()}",
        "payload": "float32",
        "timeout": 60,
        "connect_timeout": 100,
    }
    return DistillSettings(vocab_size=jobs.TRUE_VOCAB, ce_weight=0.25).replaced(**{**link, **changes})


def gradients_of(ranks: list[SimpleNamespace]) -> dict[str, torch.Tensor]:
    shards = {place: part for rank in ranks for place, part in rank.gradients.items()}
    return to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)


def check_equal(local: list[SimpleNamespace], linked: list[SimpleNamespace], chunks: int = 1) -> None:
    for mine, other in zip(local, linked, strict=True):
        assert len(mine.distilled) == len(other.distilled)
        for name in ("distilled", "measured_losses"):
            for loss, expected in zip(getattr(mine, name), getattr(other, name), strict=True):
                torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        for evaluation, expected in zip(mine.plain, other.plain, strict=True):
            for loss, plain in zip(evaluation, expected, strict=True):
                torch.testing.assert_close(loss, plain, atol=1e-6, rtol=1e-6)
        assert mine.frozen and mine.names_unchanged and mine.hooks_left == 0
        assert mine.figures.link_bytes == 0 and mine.figures.teacher_wait == 0
        assert mine.figures.tokens == other.figures.tokens
        for name in ("loss", "divergence", "weight", "agreement", "student_more_valid"):
            for own, its in ((mine.figures, other.figures), (mine.measured, other.measured)):
                assert getattr(own, name) == pytest.approx(getattr(its, name), rel=1e-6, abs=1e-9), name
        evaluated, trained, again = mine.ran
        assert evaluated == 0 and again == trained, "evaluation must not run the teacher"
        assert trained == chunks * MICRO_BATCHES, "once per micro-batch"
    found, expected = gradients_of(local), gradients_of(linked)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


MICRO_BATCHES = 4


def compare(local: World, linked: World, teacher: World, chunks: int = 1) -> list[list[SimpleNamespace]]:
    """Each variant of the local student against the linked one; the variants, by rank."""
    by_rank, reference, _ = run_worlds(local, linked, teacher)
    variants = [list(ranks) for ranks in zip(*by_rank, strict=True)]
    linked_ranks = [ranks[0] for ranks in reference]
    for ranks in variants:
        check_equal(ranks, linked_ranks, chunks)
    return variants


def test_one_process():
    """Teacher and student differ in the padding of the vocabulary too; the truth is that of the reference."""
    chosen = settings(divergence="jeffreys")
    variants = [
        {"teacher": jobs.TEACHER},
        {"teacher": jobs.TEACHER, "payload": "hidden", "lazily": True},
    ]
    found = compare(
        World(colocated_jobs.students, arguments=(chosen, MICRO_BATCHES, variants)),
        World(colocated_jobs.students, arguments=(chosen, MICRO_BATCHES, [{"teacher": None}])),
        World(colocated_jobs.serve, arguments=(chosen, jobs.TEACHER)),
    )
    ((truth,),) = run_worlds(World(jobs.direct, arguments=(chosen, MICRO_BATCHES)))
    for (rank,) in found:
        for loss, expected in zip(rank.distilled, truth.distilled, strict=True):
            torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)
        for name, gradient in gradients_of([rank]).items():
            scale = truth.gradients[name].abs().max()
            torch.testing.assert_close(
                gradient / scale, truth.gradients[name] / scale, atol=2e-4, rtol=0, msg=name
            )


def test_tensor_parallel():
    chosen = settings(divergence="jsd")
    variants = [
        {"teacher": colocated_jobs.TEACHER},
        {"teacher": colocated_jobs.TEACHER, "payload": "hidden"},
        {"teacher": colocated_jobs.TEACHER, "payload": "hidden", "fused_head": "on"},  # no logits of either
    ]
    compare(
        World(colocated_jobs.students, 2, tensor=2, arguments=(chosen, MICRO_BATCHES, variants)),
        World(colocated_jobs.students, 2, tensor=2, arguments=(chosen, MICRO_BATCHES, [{"teacher": None}])),
        World(colocated_jobs.serve, arguments=(chosen, colocated_jobs.TEACHER)),
    )


def test_pipeline_with_and_without_recomputed_activations():
    chosen = settings()
    # Without deallocation Megatron goes by torch.autograd.backward, in which the CPU mode redirects nothing.
    recomputed = {
        "deallocate_pipeline_outputs": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    variants = [
        {"teacher": colocated_jobs.TEACHER},
        {"teacher": colocated_jobs.TEACHER, "payload": "hidden", "deallocate_pipeline_outputs": True},
        {"teacher": colocated_jobs.TEACHER, **recomputed},
    ]
    compare(
        World(colocated_jobs.students, 2, pipeline=2, arguments=(chosen, MICRO_BATCHES, variants)),
        World(colocated_jobs.students, 2, pipeline=2, arguments=(chosen, MICRO_BATCHES, [{"teacher": None}])),
        World(colocated_jobs.serve, arguments=(chosen, colocated_jobs.TEACHER)),
    )


def test_interleaved_pipeline():
    chosen = settings(validity="margin")
    shape = colocated_jobs.INTERLEAVED_TEACHER
    compare(
        World(
            colocated_jobs.students,
            2,
            pipeline=2,
            virtual=2,
            arguments=(chosen, MICRO_BATCHES, [{"teacher": shape, "per_rank": 2}]),
        ),
        World(
            colocated_jobs.students,
            2,
            pipeline=2,
            virtual=2,
            arguments=(chosen, MICRO_BATCHES, [{"teacher": None, "per_rank": 2}]),
        ),
        World(colocated_jobs.serve, arguments=(chosen, shape)),
        chunks=2,
    )


def test_a_checkpoint_is_loaded_as_the_documentation_says(tmp_path):
    (found,) = run_worlds(World(colocated_jobs.save_and_load, 2, pipeline=2, arguments=(str(tmp_path),)))
    assert found == [(False, True)] * 2


@pytest.mark.skipif(
    sys.version_info < (3, 12) or importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training is not installed",
)
@pytest.mark.slow
def test_a_run_of_megatron_training_evaluates_and_saves_without_the_teacher(tmp_path):
    arguments = (
        "--distributed-backend gloo --use-cpu-initialization --transformer-impl local --no-persist-layer-norm "
        "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-rope-fusion "
        "--no-bias-gelu-fusion --num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 16 "
        "--max-position-embeddings 16 --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 "
        "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 8 --mock-data "
        "--untie-embeddings-and-output-weights --init-method-std 0.3 --num-workers 0 --micro-batch-size 2 "
        "--global-batch-size 8 --lr 3e-2 --log-interval 1 --train-iters 4 --eval-iters 1 --eval-interval 2 "
        f"--pipeline-model-parallel-size 2 --ckpt-format torch_dist --save {tmp_path} --save-interval 4 "
        f"--data-cache-path {tmp_path / 'cache'}"
    )
    script = str(Path(colocated_jobs.__file__).with_name("colocated_pretrain.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(free_port()), script, *arguments.split()]
    environment = {**os.environ, "USE_LIBUV": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r" lm loss: ([0-9.E+-]+)", done.stdout)]
    divergences = [float(value) for value in re.findall(r"vcrd divergence: ([0-9.E+-]+)", done.stdout)]
    assert len(losses) == len(divergences) == 4 and losses[-1] < losses[0] and min(divergences) > 0
    assert "validation loss at iteration 2" in done.stdout
    saved = FileSystemReader(tmp_path / "iter_0000004").read_metadata().state_dict_metadata
    sizes = {size for entry in saved.values() for size in getattr(entry, "size", ())}
    assert {16, 64} <= sizes and 24 not in sizes, "the teacher is no part of the checkpoint"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"address": None, "teacher": "cache:/answers"}, "VCRD_TEACHER"),
        ({"address": "math=h:1,code=h:2"}, "VCRD_ADDRESS"),
        ({"address": "math=h:1,code=h:2", "teacher_weights": "math=2"}, "VCRD_TEACHER_WEIGHTS"),
        ({"address": "math=h:1,code=h:2", "teacher_mixture": "math=1,code=2"}, "VCRD_TEACHER_MIXTURE"),
    ],
)
def test_settings_of_other_teachers_are_refused(changes, name):
    with pytest.raises(
        ValueError, match=f"^{name} .*: expected none with a teacher in the same ranks, got '"
    ):
        distill(lambda *_: None, settings(**changes), teacher=torch.nn.Linear(1, 1))


def test_a_teacher_that_does_not_fit_is_one_sentence():
    ((sentences,), padding, fixed) = run_worlds(
        World(colocated_jobs.refusals, arguments=(settings(),)),
        World(colocated_jobs.refuse_padding, 2, tensor=2, arguments=(settings(),)),
        World(colocated_jobs.refuse_fixed_shapes, 2, pipeline=2, arguments=(settings(),)),
    )
    expected = [
        "ValueError: payload: expected one of hidden, float16, float32 with a teacher in the same ranks",
        "TypeError: teacher: expected a model, a list of its chunks or a function that returns one, got str",
        "ValueError: teacher: expected a model of its own, got the student",
        "ValueError: teacher: expected 1 model chunk(s) per rank, as the student has, got ['GPTModel', 'GPTModel']",
        "ValueError: teacher: expected 1 model chunk(s) per rank, as the student has, got ['str']",
        "ValueError: teacher: expected a Megatron language model, got Linear",
        "ValueError: teacher: expected sequence_parallel False, as the student has, got True",
        "ValueError: fp8_recipe: expected 'tensorwise', 'blockwise' or 'mxfp8' for a teacher, got 'delayed'",
        "ValueError: tokens: expected micro-batches of a multiple of 32 tokens, because the teacher's layers multiply",
        "ValueError: teacher: expected a part with pre_process, post_process (True, True), as the student's",
        "ValueError: vocab_size: expected the true vocabulary in the settings where the teacher's padding (52)",
        "ValueError: teacher: expected sequences of up to 12 tokens, got a model of 11",
        "ValueError: decoder_input: expected None, because the teacher embeds the tokens itself, got a tensor",
        "accepted",
    ]
    assert len(sentences) == len(expected)
    for sentence, beginning in zip(sentences, expected, strict=True):
        assert sentence.startswith(beginning), sentence
    for sentence in padding:
        assert "so that the shards of 2 tensor ranks line up, got 52" in sentence
    for sentence in fixed:
        assert sentence.startswith("variable_seq_lengths: expected True in the student's configuration")
