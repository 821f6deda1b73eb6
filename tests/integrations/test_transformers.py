"""The loss in the Trainer of transformers: against the reference, and the same for any split of a step."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch
from ports import free_port
from tiny_models import VOCABULARY, assert_close, gradients, reference_losses
from worlds import World, run_worlds

import vcrd
from vcrd.integrations.transformers import (
    CalibratedTrainer,
    DistillationLoss,
    OutputLayer,
    check_trainer,
    step_sum,
)

from transformers import Trainer, TrainingArguments, default_data_collator  # isort: skip


def arguments(folder, **changes) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**options, **changes})


def dataset(batch) -> list[dict]:
    return [{name: values[row] for name, values in batch.items()} for row in range(len(batch["labels"]))]


def in_order(trainer):
    """Without shuffling, so that the split of a step is known."""
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_value_and_gradient_equal_the_reference(family, fused):
    student, teacher = tiny.model(family), tiny.model(family, columns=48, seed=2, num_hidden_layers=3)
    batch = tiny.rows()
    loss = DistillationLoss(
        student,
        teacher.train(),
        vcrd.LossConfig(divergence="jsd", temperature=1.5),
        tokenizer=tiny.tokenizer(),
        fused_head=fused,
    )
    assert not teacher.training and student.training
    out = loss(student, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
    truth, mask = reference_losses(student, teacher, batch, name="jsd", temperature=1.5)
    found = out.loss if fused else out.loss[:, :-1][mask]
    torch.testing.assert_close(found.double(), truth[mask], atol=1e-6, rtol=1e-5)
    assert out.loss.shape == ((mask.sum(),) if fused else batch["labels"].shape)
    if not fused:
        assert not out.loss[:, :-1][~mask].any() and not out.loss[:, -1].any()
    assert_close(gradients(out.loss.sum(), student), gradients(truth.sum(), student))


def test_labels_that_are_shifted_already_are_taken_as_they_are():
    student, teacher, batch = tiny.model(), tiny.model(seed=2), tiny.rows()
    loss = DistillationLoss(student, teacher)
    inputs = {"input_ids": batch["input_ids"]}
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    found = loss(student, {**inputs, "shift_labels": shifted}, torch.zeros_like(shifted)).loss
    assert torch.equal(found, loss(student, inputs, batch["labels"]).loss)


def test_steps_of_two_rows_are_two_steps():
    student, teacher, batch = tiny.model(), tiny.model(seed=2), tiny.rows()
    steps = torch.arange(9).expand(4, 9) // 3 - 1
    truth, mask = reference_losses(
        student, teacher, batch, steps=torch.where(steps >= 0, steps + 10 * torch.arange(4)[:, None], -1)
    )
    loss = DistillationLoss(student, teacher, vcrd.LossConfig(vocab_size=VOCABULARY))
    found = loss(student, {"input_ids": batch["input_ids"]}, batch["labels"], steps=steps).loss
    torch.testing.assert_close(found[:, :-1][mask].double(), truth[mask], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_one_optimizer_step_is_the_gradient_of_the_mean_loss_for_any_accumulation(fused, tmp_path):
    batch, after = tiny.rows(), []
    for size, accumulation in ((4, 1), (1, 4), (3, 2)):
        student, teacher = tiny.model(), tiny.model(columns=48, seed=2)
        before = weights(student)
        trainer = CalibratedTrainer(
            student,
            arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation),
            teacher_model=teacher,
            train_dataset=dataset(batch),
            processing_class=tiny.tokenizer(),
            fused_head=fused,
        )
        in_order(trainer).train()
        after.append(weights(student))
    student = tiny.model()
    truth, mask = reference_losses(student, teacher, batch)
    mean = truth.sum() / mask.sum()
    expected = [old - step for old, step in zip(before, gradients(mean, student), strict=True)]
    for found in after:
        assert_close(
            [a - b for a, b in zip(found, before, strict=True)],
            [a - b for a, b in zip(expected, before, strict=True)],
        )
    (logged, *_) = trainer.state.log_history
    assert logged["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert 0.1 <= logged["weight"] <= 1.9 and 0 <= logged["relative_validity"] <= 1
    divergences, _ = reference_losses(tiny.model(), teacher, batch, validity="uniform")
    assert logged["divergence"] == pytest.approx(divergences.sum().item() / mask.sum().item(), rel=1e-5)
    logits = tiny.model()(batch["input_ids"]).logits[:, :-1, :VOCABULARY]
    entropies = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert logged["cross_entropy"] == pytest.approx(entropies.item(), rel=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_what_ddp_makes_of_the_parts_of_two_processes(average):
    """The mean of both. `average`: the Trainer's count is that of both, or else each one's own."""
    student, teacher, batch = tiny.model(), tiny.model(seed=2), tiny.rows()
    truth, mask = reference_losses(student, teacher, batch)
    calibrated = DistillationLoss(student, teacher, vcrd.LossConfig(vocab_size=VOCABULARY))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2),
        args=SimpleNamespace(average_tokens_across_devices=average),
    )
    found = right = 0.0
    for own in (slice(0, 2), slice(2, 4)):
        losses = calibrated(student, {"input_ids": batch["input_ids"][own]}, batch["labels"][own]).loss
        count = mask.sum() if average else mask[own].sum()
        found = found + step_sum(trainer, losses, count) / 2
        right = right + truth[own].sum() / (count if average else 2 * count)
    torch.testing.assert_close(found.double(), right, atol=0, rtol=1e-5)
    assert_close(gradients(found, student), gradients(right, student))


VARIANTS = ((2, True, False), (1, True, True), (1, False, False))  # accumulation, average, fused head


def _train_on_a_rank(port: int, folder: str) -> list:
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = []
    for accumulation, average, fused in VARIANTS:
        student = tiny.model()
        trainer = CalibratedTrainer(
            student,
            arguments(
                folder,
                per_device_train_batch_size=2 // accumulation,
                gradient_accumulation_steps=accumulation,
                average_tokens_across_devices=average,
                ddp_backend="gloo",
            ),
            teacher_model=tiny.model(columns=48, seed=2),
            train_dataset=dataset(tiny.rows()),
            processing_class=tiny.tokenizer(),
            fused_head=fused,
        )
        in_order(trainer).train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        found.append((weights(student), trainer.state.log_history[0]))
    return found


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    (ranks,) = run_worlds(World(_train_on_a_rank, size=2, arguments=(free_port(), str(tmp_path))))
    student, teacher = tiny.model(), tiny.model(columns=48, seed=2)
    truth, mask = reference_losses(student, teacher, tiny.rows())
    mean = truth.sum() / mask.sum()
    # Rows 0 and 1 are those of process 0. Without `average_tokens_across_devices` the processes count for one each.
    own_means = (truth[:2].sum() / mask[:2].sum() + truth[2:].sum() / mask[2:].sum()) / 2
    assert abs(own_means - mean) > 0.01 * mean
    for place, (_, average, _) in enumerate(VARIANTS):
        right = mean if average else own_means
        truth_gradients = gradients(right, student, keep=True)
        for after, logged in (rank[place] for rank in ranks):
            steps = [old - new for old, new in zip(weights(student), after, strict=True)]
            assert_close(steps, truth_gradients)
            assert logged["loss"] == pytest.approx(right.item(), rel=1e-5)
        assert ranks[0][place][1]["weight"] == ranks[1][place][1]["weight"]


def test_columns_reach_the_loss_and_evaluation_is_plain_cross_entropy(tmp_path):
    batch = tiny.rows()
    generator = torch.Generator().manual_seed(5)
    scores = [torch.rand(4, 9, generator=generator) for _ in range(2)]
    columns = {
        "student_validity": scores[0],
        "teacher_validity": scores[1],
        "steps": torch.arange(9).repeat(4, 1) // 2,
    }
    student, teacher = tiny.model(), tiny.model(seed=2)
    before = weights(student)
    everything = dataset({**batch, **columns})
    trainer = CalibratedTrainer(
        student,
        arguments(tmp_path, gradient_accumulation_steps=1, eval_strategy="steps", eval_steps=1),
        teacher_model=teacher,
        loss_config=vcrd.LossConfig(validity="scores", vocab_size=VOCABULARY),
        columns=tuple(columns),
        train_dataset=everything,
        eval_dataset=everything,
    )
    plain = Trainer(tiny.model(), arguments(tmp_path), eval_dataset=dataset(batch)).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    trainer.train()
    student = tiny.model()
    steps = columns["steps"] + 10 * torch.arange(4)[:, None]
    truth, mask = reference_losses(student, teacher, batch, steps=steps, scores=scores)
    found = [old - new for old, new in zip(before, weights(trainer.model), strict=True)]
    assert_close(found, gradients(truth.sum() / mask.sum(), student))
    names = [set(entry) for entry in trainer.state.log_history]
    assert any("eval_loss" in entry and "weight" not in entry for entry in names)

    trainer.train_dataset = dataset(batch)
    with pytest.raises(
        ValueError, match="^student_validity: expected in every training batch, got input_ids"
    ):
        trainer.train()


def test_the_adapters_of_peft_learn_and_nothing_else(tmp_path):
    peft = pytest.importorskip("peft")
    batch, teacher = tiny.rows(), tiny.model(seed=2)
    steps = []
    for fused in (False, True):
        torch.manual_seed(7)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        student = peft.get_peft_model(tiny.model(), config)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        CalibratedTrainer(
            student,
            arguments(tmp_path, gradient_checkpointing=fused),
            teacher_model=teacher,
            train_dataset=dataset(batch),
            processing_class=tiny.tokenizer(),
            fused_head=fused,
        ).train()
        step = {name: before[name] - value for name, value in student.state_dict().items()}
        assert all(("lora" in name) == bool(value.any()) for name, value in step.items()), step.keys()
        steps.append([value for name, value in step.items() if "lora" in name])
    assert_close(*steps)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_training_in_bfloat16_brings_the_student_to_its_teacher(fused, tmp_path):
    batch = tiny.rows(count=64, length=12)
    student, teacher = tiny.model(num_hidden_layers=1), tiny.model(seed=2, num_hidden_layers=1)
    trainer = CalibratedTrainer(
        student,
        arguments(
            tmp_path,
            optim="adamw_torch",
            learning_rate=1e-2,
            max_steps=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            bf16=True,
        ),
        teacher_model=teacher,
        loss_config=vcrd.LossConfig(inplace_gradient="if_unused"),
        train_dataset=dataset(batch),
        processing_class=tiny.tokenizer(),
        fused_head=fused,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2]), losses


def test_the_code_of_the_page_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = dataset(tiny.rows())
    names = {
        "model": tiny.model(),
        "teacher": tiny.model(columns=48, seed=2),
        "tokenizer": tiny.tokenizer(),
        "dataset": rows,
        "held_out": rows,
        "collator": default_data_collator,
    }
    exec(tiny.code_of_the_page("CalibratedTrainer("), names)
    assert names["trainer"].state.global_step == 3


def trainer_with(folder, *, student=None, teacher=None, settings=None, **options) -> CalibratedTrainer:
    return CalibratedTrainer(
        student or tiny.model(),
        arguments(folder, **(settings or {})),
        teacher_model=teacher or tiny.model(seed=2),
        train_dataset=dataset(tiny.rows()),
        **options,
    )


def test_what_cannot_be_right_is_refused(tmp_path):
    def refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            trainer_with(tmp_path, **options)

    student = tiny.model()
    refused("^teacher_model: expected another model than the student", student=student, teacher=student)
    refused("^label_smoothing_factor: expected 0", settings={"label_smoothing_factor": 0.1})
    refused("^compute_loss_func: expected None", compute_loss_func=lambda *_: 0)
    refused("^loss_config: expected a LossConfig or None, got str", TypeError, loss_config="jsd")
    refused("^fused_head: expected True or False", TypeError, fused_head=1)
    refused("^columns: expected one of steps", columns=("step",))
    refused("^columns: expected a sequence of names, got str", TypeError, columns="steps")
    scores, privileged = (vcrd.LossConfig(validity=name) for name in ("scores", "privileged"))
    refused("^columns: expected student_validity and teacher_validity with", loss_config=scores)
    refused("^validity: expected another one, because no judge answers", loss_config=privileged)
    refused(
        "^teacher_model: expected a causal language model",
        TypeError,
        teacher=torch.nn.Linear(2, 2),
        fused_head=True,
    )
    refused("^fused_head: expected neither FSDP", settings={"torch_compile": True}, fused_head=True)
    trainer = trainer_with(tmp_path)
    for name, method in (("tensor", "get_tp_size"), ("context", "get_cp_size"), ("sequence", "get_sp_size")):
        setattr(trainer, method, lambda: 2)
        with pytest.raises(ValueError, match=f"^{name} parallel size: expected 1 .*, got 2"):
            check_trainer(trainer, False)
        setattr(trainer, method, lambda: 1)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="^n_gpu: expected 1 with a calibrated loss, got 2"):
        check_trainer(trainer, False)
    experts = tiny.model()
    experts.config.output_router_logits = True
    refused("^output_router_logits: expected", student=experts)
    biased = tiny.model()
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(40))
    refused("^student: expected an output layer that is a plain nn.Linear", student=biased, fused_head=True)
    scaled = tiny.model(seed=2)
    scaled.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 1.1,))
    refused("^teacher_model: expected a model with logits_to_keep", teacher=scaled, fused_head=True)


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    wider = tiny.model(columns=48, seed=2)
    with pytest.raises(ValueError, match="^vocab_size: needed where student and teacher are padded"):
        trainer_with(tmp_path, teacher=wider).train()
    with pytest.raises(ValueError, match="^vocab_size: expected 1 to the student's 40 columns, got 48"):
        trainer_with(tmp_path, teacher=wider, loss_config=vcrd.LossConfig(vocab_size=48)).train()
    trainer = trainer_with(tmp_path, student=tiny.model(columns=30), processing_class=tiny.tokenizer())
    trainer.train_dataset = dataset({name: values.clamp(max=29) for name, values in tiny.rows().items()})
    with pytest.raises(ValueError, match="^vocab_size: expected 1 to the student's 30 columns, got 37"):
        trainer.train()


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.train_dataset = [{"input_ids": row["input_ids"]} for row in trainer.train_dataset]
    with pytest.raises(ValueError, match="^labels: expected in every training batch, got input_ids"):
        trainer.train()
    inputs = {name: values[None] for name, values in dataset(tiny.rows())[0].items()}
    with pytest.raises(ValueError, match="^num_items_in_batch: expected the Trainer's count"):
        trainer.compute_loss(trainer.model.train(), inputs)


def test_what_a_loop_gives_the_loss_is_checked():
    student, teacher, ids = tiny.model(), tiny.model(seed=2), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="^tokenizer: expected a tokenizer or None, got str"):
        DistillationLoss(student, teacher, tokenizer="gpt2")
    with pytest.raises(TypeError, match="^product_dtype: expected a torch.dtype or None, got str"):
        DistillationLoss(student, teacher, product_dtype="bf16")
    with pytest.raises(TypeError, match="^labels: expected a tensor, got NoneType"):
        DistillationLoss(student, teacher)(student, {"input_ids": ids}, None)
    with pytest.raises(ValueError, match="^student: expected the model of the constructor, or a wrapper"):
        DistillationLoss(student, teacher, fused_head=True)(tiny.model(), {"input_ids": ids}, ids)


def test_a_batch_in_which_no_token_counts_has_loss_and_gradient_0():
    batch, student, teacher = tiny.rows(), tiny.model(), tiny.model(seed=2)
    for fused in (False, True):
        loss = DistillationLoss(student, teacher, fused_head=fused)
        out = loss(student, {"input_ids": batch["input_ids"]}, torch.full_like(batch["labels"], -100))
        total = out.loss.sum()
        assert total == 0
        assert not any(gradient.any() for gradient in gradients(total, student))


def test_the_check_of_the_output_layer_leaves_the_model_as_it_was():
    model = tiny.model("gemma2").train()
    layer = OutputLayer.of("student", model)
    assert model.training and layer.softcap == 5.0 and layer.scale == 1.0
    assert not model.lm_head._forward_pre_hooks and not model.model._forward_hooks
