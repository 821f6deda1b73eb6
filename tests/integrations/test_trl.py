"""The loss in the trainers of TRL: `uniform` is their own loss, and their sampling keeps working."""

from __future__ import annotations

import os

import pytest
import tiny_models as tiny
import torch
from ports import free_port
from tiny_models import VOCABULARY, assert_close, gradients, reference_losses
from worlds import World, run_worlds

import vcrd

trl = pytest.importorskip("trl")

from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

from vcrd.integrations.trl import (  # noqa: E402
    CalibratedDistillationTrainer,
    CalibratedGKDTrainer,
    CalibratedSFTTrainer,
    config_for_samples,
)

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
DIVERGENCES = ({"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.3}, {"divergence": "reverse_kl"})
BETAS = (0.0, 0.3, 1.0)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def arguments(kind, folder, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(**{**options, **changes})


def words() -> object:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversations(count: int = 8) -> object:
    from datasets import Dataset

    rows = [
        [
            {"role": "user", "content": " ".join(f"w{3 + (5 * row + n) % 30}" for n in range(2 + row % 3))},
            {
                "role": "assistant",
                "content": " ".join(f"w{3 + (7 * row + n) % 30}" for n in range(1 + row % 4)),
            },
        ]
        for row in range(count)
    ]
    return Dataset.from_dict({"messages": rows})


def prompts(count: int = 8) -> object:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"w{3 + row} w{5 + row}" for row in range(count)]})


# Every column is a token of the tokenizer, for TRL counts all columns.
def models(columns: int = VOCABULARY):
    return tiny.model(columns=columns), tiny.model(columns=columns, seed=2)


def gkd(folder, *, loss_config=None, fused_head=False, columns=VOCABULARY, **changes) -> CalibratedGKDTrainer:
    student, teacher = models(columns)
    return CalibratedGKDTrainer(
        student,
        teacher,
        args=arguments(GKDConfig, folder, **{"lmbda": 0.0, "max_length": 64, "max_new_tokens": 6, **changes}),
        train_dataset=conversations(),
        processing_class=words(),
        loss_config=loss_config,
        fused_head=fused_head,
    )


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_uniform_is_the_loss_of_gkd(fused, tmp_path):
    batch = tiny.rows()
    for beta, options in zip(BETAS, DIVERGENCES, strict=True):
        config = vcrd.LossConfig(validity="uniform", **options)
        trainer = gkd(tmp_path, loss_config=config, fused_head=fused)
        student = trainer.model.train()
        count = (batch["labels"][:, 1:] != -100).sum()
        ours = trainer.compute_loss(student, batch, num_items_in_batch=count)
        trainer.beta = beta
        theirs = GKDTrainer.compute_loss(trainer, student, batch, num_items_in_batch=count)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-5)
        assert_close(gradients(ours, student), gradients(theirs, student))
        assert torch.equal(trainer.compute_loss(student.eval(), batch), theirs), "evaluation stays theirs"


def distillation(
    folder, *, loss_config=None, family="llama", columns=VOCABULARY, **changes
) -> CalibratedDistillationTrainer:
    student, teacher = (tiny.model(family, columns=columns, seed=seed) for seed in (1, 2))
    return CalibratedDistillationTrainer(
        student,
        teacher,
        args=arguments(DistillationConfig, folder, **{"max_completion_length": 6, **changes}),
        train_dataset=prompts(),
        processing_class=words(),
        loss_config=loss_config,
    )


def completions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    prompt_mask, completion_mask = torch.ones(3, 4).long(), torch.ones(3, 7).long()
    prompt_mask[1, :2] = completion_mask[0, 5:] = completion_mask[2, 1:] = 0
    tool_mask = torch.ones(3, 7).long()
    tool_mask[1, 2:4] = 0
    return {
        "prompt_ids": ids[:, :4],
        "completion_ids": ids[:, 4:],
        "prompt_mask": prompt_mask,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
    }


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_uniform_is_the_loss_of_the_distillation_trainer(family, tmp_path):
    batch = completions()
    for beta, options in zip(BETAS, DIVERGENCES, strict=True):
        config = vcrd.LossConfig(validity="uniform", temperature=1.3, **options)
        trainer = distillation(tmp_path, loss_config=config, family=family, temperature=1.3)
        student = trainer.model.train()
        ours, _, tokens = trainer._compute_loss(student, batch, torch.tensor(5.0))
        trainer.beta = beta
        theirs, _, their_tokens = DistillationTrainer._compute_loss(
            trainer, student, batch, torch.tensor(5.0)
        )
        assert tokens == their_tokens == 11
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-5)
        assert_close(gradients(ours, student), gradients(theirs, student))
        student.eval()
        assert torch.equal(trainer._compute_loss(student, batch, None)[0], theirs * 5 / 11)
    trainer = distillation(tmp_path)
    ours, entropy, _ = trainer._compute_loss(trainer.model.train(), batch, None)
    _, their_entropy, _ = DistillationTrainer._compute_loss(trainer, trainer.model, batch, None)
    torch.testing.assert_close(entropy, their_entropy, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="^inputs: expected text, got pixel_values"):
        trainer._compute_loss(trainer.model, {**batch, "pixel_values": torch.zeros(1)}, None)


def watch(trainer, name: str) -> list:
    """Keeps the positional arguments after the model of each call of this method."""
    seen, inner = [], getattr(trainer, name)

    def watched(model, *given, **named):
        seen.append((dict(given[0]), *given[1:], *named.values()))
        return inner(model, *given, **named)

    setattr(trainer, name, watched)
    return seen


def as_batch(inputs) -> dict[str, torch.Tensor]:
    """A batch of DistillationTrainer in the form of the others."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    counts = torch.cat([torch.zeros_like(inputs["prompt_ids"]), inputs["completion_mask"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return {"input_ids": ids, "attention_mask": attention, "labels": torch.where(counts == 1, ids, -100)}


def assert_one_step(after, batches, loss: float, **options) -> int:
    """The step was down the gradient of the mean reference loss of all these batches. Returns their tokens."""
    student, teacher = models()
    losses = [reference_losses(student, teacher, batch, **options) for batch in batches]
    total = sum(mask.sum() for _, mask in losses)
    mean = sum(loss.sum() for loss, _ in losses) / total
    steps = [(old - new).detach() / 0.5 for old, new in zip(student.parameters(), after, strict=True)]
    assert_close(steps, gradients(mean, student))
    assert loss == pytest.approx(mean.item(), rel=1e-4)
    return int(total)


@pytest.mark.parametrize(("lmbda", "seq_kd"), [(1.0, False), (0.0, True)], ids=["student", "teacher"])
def test_gkd_divides_by_the_tokens_that_were_sampled(lmbda, seq_kd, tmp_path):
    trainer = gkd(tmp_path, lmbda=lmbda, seq_kd=seq_kd, gradient_accumulation_steps=2)
    seen = watch(trainer, "compute_loss")
    trainer.train()
    batches = [inputs for inputs, _ in seen]
    for inputs in batches:
        prompt = inputs["prompts"].shape[1]
        assert inputs["labels"].shape[1] > prompt and (inputs["labels"][:, :prompt] == -100).all()
    logged = trainer.state.log_history[0]
    total = assert_one_step(
        trainer.model.parameters(), batches, logged["loss"], validity="confidence", name="jsd"
    )
    assert [count for _, count in seen] == [total, total]
    assert logged["weight"] > 0


def test_the_distillation_trainer_trains_on_its_samples(tmp_path):
    trainer = distillation(tmp_path, gradient_accumulation_steps=2)
    seen = watch(trainer, "_compute_loss")
    trainer.train()
    batches = [as_batch(inputs) for inputs, _ in seen]
    logged = trainer.state.log_history[0]
    total = assert_one_step(
        trainer.model.parameters(), batches, logged["loss"], validity="confidence", name="reverse_kl"
    )
    assert [count for _, count in seen] == [total, total]
    assert logged["weight"] > 0 and logged["entropy"] > 0


@pytest.mark.parametrize("make", [gkd, distillation])
def test_the_padding_of_the_output_layer_is_never_sampled(make, tmp_path):
    """Nearly all columns are padding here, and an id past the vocabulary is an error in the loss."""
    options = {"lmbda": 1.0} if make is gkd else {}
    trainer = make(tmp_path, columns=8 * VOCABULARY, **options)
    trainer.train()
    assert trainer.state.global_step == 1


def _train_on_a_rank(port: int, folder: str) -> list:
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    found = []
    for make, name in ((gkd, "compute_loss"), (distillation, "_compute_loss")):
        options = {"lmbda": 1.0} if make is gkd else {}
        trainer = make(folder, gradient_accumulation_steps=2, ddp_backend="gloo", **options)
        seen = watch(trainer, name)
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        batches = [as_batch(call[0]) if make is distillation else call[0] for call in seen]
        after = [parameter.detach() for parameter in trainer.model.parameters()]
        found.append((after, batches, trainer.state.log_history[0]["loss"]))
    return found


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    (ranks,) = run_worlds(World(_train_on_a_rank, size=2, arguments=(free_port(), str(tmp_path))))
    for place, name in enumerate(("jsd", "reverse_kl")):
        after, batches, loss = ranks[0][place]
        assert all(torch.equal(one, other) for one, other in zip(after, ranks[1][place][0], strict=True))
        batches = [*batches, *ranks[1][place][1]]
        assert len(batches) == 4
        assert_one_step(after, batches, loss, validity="confidence", name=name)


def test_supervised_data_of_trl_with_a_teacher(tmp_path):
    student, teacher = models()
    data = {
        "train_dataset": conversations(),
        "eval_dataset": conversations(4),
        "processing_class": words(),
    }
    trainer = CalibratedSFTTrainer(
        student,
        arguments(SFTConfig, tmp_path, max_length=64, gradient_accumulation_steps=2),
        teacher_model=teacher,
        **data,
    )
    seen = watch(trainer, "compute_loss")
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert_one_step(trainer.model.parameters(), [inputs for inputs, _ in seen], loss)
    assert trainer.state.log_history[0]["weight"] > 0

    own = SFTTrainer(trainer.model, trainer.args, **data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], rel=1e-6)


def test_the_code_of_the_page_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, teacher = models()
    names = {"model": student, "teacher": teacher, "dataset": conversations(), "tokenizer": words()}
    # Its default of bfloat16 needs a GPU, or `use_cpu`.
    code = tiny.code_of_the_page("CalibratedGKDTrainer(").replace(
        'GKDConfig("out"', 'GKDConfig("out", use_cpu=True, max_new_tokens=4'
    )
    exec(code, names)
    assert names["trainer"].state.global_step == 3


def test_labels_that_nobody_verified_are_refused(tmp_path):
    for options in ({"validity": "label"}, {"validity": "scores"}):
        with pytest.raises(ValueError, match="^validity: expected confidence, margin, uniform or a callable"):
            gkd(tmp_path, loss_config=vcrd.LossConfig(**options), lmbda=0.5)
    with pytest.raises(TypeError, match="^loss_config: expected a LossConfig or None, got dict"):
        gkd(tmp_path, loss_config={"divergence": "jsd"})
    with pytest.raises(ValueError, match="^ce_weight: expected 0 where a model samples"):
        distillation(tmp_path, loss_config=vcrd.LossConfig(validity="margin", ce_weight=0.1))
    with pytest.raises(ValueError, match="^beta: expected 0.5, the default, where loss_config names"):
        gkd(tmp_path, loss_config=vcrd.LossConfig(), beta=0.1)
    assert gkd(tmp_path, loss_config=vcrd.LossConfig()).distillation.config.validity == "label"


def test_the_divergence_without_a_config_is_that_of_trl():
    for beta, options in zip(BETAS, DIVERGENCES, strict=True):
        found = config_for_samples(None, beta, 0.5, 1.2, sampled=True)
        assert found == vcrd.LossConfig(validity="confidence", temperature=1.2, **options)
