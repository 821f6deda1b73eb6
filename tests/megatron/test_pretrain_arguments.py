"""What Megatron's arguments change around the plug: checkpoint formats, data workers, extra heads, packed documents."""

from __future__ import annotations

import importlib.util
import re

import pretrain_jobs as jobs
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)

STEPS = 3
STEPS_OF = f"--train-iters {STEPS} --eval-interval {STEPS}"
FRESH = "--finetune --no-load-optim --no-load-rng"
HEADS = "--mtp-num-layers 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the teacher's initial weights, in Megatron's distributed format."""
    found = tmp_path_factory.mktemp("arguments")
    jobs.save_weights(found / "teacher", jobs.TEACHER, 120)
    return found


@pytest.mark.slow
def test_a_legacy_checkpoint_its_arguments_and_data_workers_change_no_loss(folder):
    expected = jobs.curve(folder, jobs.Run(), STEPS)
    jobs.save_weights(folder / "legacy", jobs.TEACHER, 120, form="torch")
    # Neither job is told its shape.
    teacher = f"{jobs.CPU} --load {folder / 'legacy'} --ckpt-format torch --use-checkpoint-args"
    student = f"{jobs.CPU} {jobs.DATA} {jobs.TRAINING} {STEPS_OF} --num-workers 2"
    student += f" --load {folder / 'student'} {FRESH} --use-checkpoint-args"
    assert jobs.losses(jobs.train(folder, student, teacher), STEPS) == expected


@pytest.mark.slow
def test_a_legacy_checkpoint_of_another_layout_is_a_failure_with_a_sentence(folder):
    jobs.save_weights(folder / "legacy", jobs.TEACHER, 120, form="torch")
    teacher = f"{jobs.CPU} --load {folder / 'legacy'} --ckpt-format torch --use-checkpoint-args"
    with pytest.raises(jobs.Failed, match="--load: expected a checkpoint .* keeps the tensor and pipeline"):
        jobs.train(
            folder,
            f"{teacher} --pipeline-model-parallel-size 2",
            "",
            2,
            0,
            script="examples/serve_teacher.py",
        )


def test_a_teacher_without_a_checkpoint_does_not_serve_random_weights(folder):
    teacher = f"{jobs.TEACHER} --global-batch-size 1 --load {folder / 'nowhere'}"
    with pytest.raises(
        jobs.Failed, match="--load: expected the folder of a Megatron checkpoint, got .*nowhere"
    ):
        jobs.train(folder, teacher, "", 1, 0, script="examples/serve_teacher.py")


@pytest.mark.slow
def test_heads_that_predict_further_tokens_keep_their_own_loss(folder):
    """The main head's first loss is that of the same weights without them; stages change no curve."""
    jobs.save_weights(folder / "heads", f"{jobs.STUDENT} {HEADS}", 120)
    student = f"{jobs.STUDENT} --load {folder / 'heads'} {FRESH} {STEPS_OF}"
    teacher = f"{jobs.TEACHER} --load {folder / 'teacher'} --global-batch-size 1"
    without = jobs.losses(jobs.train(folder, student, teacher), STEPS)
    text = jobs.train(folder, f"{student} {HEADS}", teacher)
    expected = jobs.losses(text, STEPS)
    assert expected[0] == pytest.approx(without[0], rel=1e-6) and expected[1:] != without[1:]
    assert len(re.findall(r"mtp_1 loss: [0-9]", text)) == STEPS
    staged = jobs.train(folder, f"{student} {HEADS} --pipeline-model-parallel-size 2", teacher, 2)
    assert jobs.losses(staged, STEPS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_teacher_with_further_heads_teaches_alike_in_another_job_and_in_the_same_ranks(folder):
    heads = folder / "teacher_with_heads"
    jobs.save_weights(heads, f"{jobs.TEACHER} {HEADS}", 120)
    jobs.save_weights(folder / "beginner", jobs.STUDENT, 120)
    student = f"{jobs.STUDENT} --load {folder / 'beginner'} {FRESH} {STEPS_OF}"
    teacher = f"{jobs.TEACHER} {HEADS} --load {heads} --global-batch-size 1"
    linked = jobs.losses(jobs.train(folder, student, teacher), STEPS)
    beside = jobs.train(folder, f"{student} --vcrd-local-teacher {heads}", "", 1, 0)
    assert jobs.losses(beside, STEPS) == pytest.approx(linked, rel=1e-6)


@pytest.mark.slow
def test_a_teacher_with_the_students_weights_sees_the_same_documents(folder):
    """Megatron packs documents of a few tokens into samples, and two samples into a row: no divergence at any token."""
    same = jobs.TEACHER.replace(" --mock-data", "")
    teacher = f"{same} --load {folder / 'teacher'} --global-batch-size 1 --mock-data"
    student = (
        f"{same} {jobs.TRAINING} {STEPS_OF} --load {folder / 'teacher'} {FRESH} --seed 7 --lr 0 --min-lr 0"
    )
    student += f" --data-path {folder / 'documents'} --split 100,0,0 --data-cache-path {folder / 'cache'}"
    student += " --dataloader-inter-document-masking"
    text = jobs.train(folder, student, teacher, script="tests/megatron/packed_pretrain.py")
    found = [float(value) for value in re.findall(r"vcrd divergence: ([0-9.E+-]+)", text)]
    assert len(found) == STEPS and max(map(abs, found)) < 1e-6
    assert re.search(r"documents in a row: ([5-9]|[1-9][0-9])", text)
