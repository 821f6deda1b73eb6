"""slime: a custom loss whose teacher runs in a job of its own, for samples of the student's own making.

    --loss-type custom_loss
    --custom-loss-function-path vcrd.integrations.slime.loss
    --custom-megatron-init-path vcrd.integrations.slime.init
    --rollout-data-postprocess-path vcrd.integrations.slime.ask_ahead

Settings are VCRD_* variables of the training processes (`--train-env-vars`). slime calls `init` on every rank of the
training job, where rank 0 opens the rendezvous, whatever its pipeline stage. It calls `ask_ahead` once per rollout, on
every rank and before the first step, with the samples and with the plan of the micro-batches. So the teacher is asked
for all of them at once, and answers while the student trains.

Written against the public sources of THUDM/slime at 624b824 and radixark/miles at 31f1ca9 (both of 21 August 2026).
"""

from __future__ import annotations

import atexit
import logging
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.plan import context_rows
from vcrd.link.rendezvous import Rendezvous, host_rendezvous
from vcrd.link.student import StudentLink
from vcrd.loss.api import validity_calibrated_kl
from vcrd.loss.config import LossConfig
from vcrd.megatron.identity import tokenizer_of
from vcrd.settings import DistillSettings, variable_of

_log = logging.getLogger("vcrd")
Reduce = Callable[[Tensor], Tensor]


def init(args: Namespace) -> None:
    """For `--custom-megatron-init-path`. Checks slime's arguments and the settings; rank 0 opens the rendezvous.

    ValueError, on every rank alike, for what the loss cannot follow. LinkError on rank 0 if the address is taken.
    """
    global _student
    _student = Student(args, DistillSettings.from_environment())


def ask_ahead(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """For `--rollout-data-postprocess-path`: asks the teacher for all micro-batches of this rollout.

    With validity "scores", `rollout_data["student_validity"]` and `["teacher_validity"]` hold, for each sample, one
    number in [0, 1] or one for each token of the response. A function of the user's own may add them and then call
    this one.

    Without this hook the teacher is asked for a micro-batch only when its loss is due.

    The first call blocks until the teacher has joined. Raises as `StudentLink.connect` and `StudentLink.request` do.
    """
    _linked().ask(rollout_data)


def loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, reduce: Reduce
) -> tuple[Tensor, dict[str, Tensor]]:
    """For `--custom-loss-function-path`: the loss of one micro-batch, and figures of it, reduced by slime.

    Args:
        batch: slime's micro-batch of packed samples.
        logits: [1, tokens of this context-parallel rank, vocabulary of this tensor rank], as the model gives them,
            without slime's rollout temperature.
        reduce: slime's sum over samples of the mean over tokens, or sum over tokens.

    Figures: `loss`, `divergence`, `weight`, `relative_validity`, and `invalid_teacher_rows`, which the loss skips.

    Collectives: those of `vcrd.validity_calibrated_kl` in the tensor-parallel group. Blocks until the answer is there.
    Raises ValueError for a micro-batch that was not asked for in this order; TeacherLost as `StudentLink.receive` does.
    """
    return _linked().loss(batch, logits, reduce)


def close() -> None:
    """Says goodbye to the teacher. Called when the process ends."""
    global _student
    if _student is not None:
        _student.close()
    _student = None


class Student:
    """This rank of the training job: its link to the teacher, and what the teacher was asked."""

    def __init__(self, args: Namespace, settings: DistillSettings) -> None:
        _refuse(args, settings)
        self._args = args
        self._settings = settings
        self._tensor = parallel_state.get_tensor_model_parallel_group()
        self._context = parallel_state.get_context_parallel_group()
        self._config: LossConfig | None = None
        self._link: StudentLink | None = None
        self._asked: deque[Row] = deque()
        self._received = 0
        self._rendezvous: Rendezvous | None = host_rendezvous(settings.link) if dist.get_rank() == 0 else None
        atexit.register(self.close)

    def ask(self, rollout_data: dict[str, Any]) -> None:
        """See `ask_ahead`."""
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        if self._asked:
            raise expected(
                "rollout_data", "a rollout after the last one was trained on", f"{len(self._asked)} left"
            )
        if any(inputs is not None for inputs in rollout_data.get("multimodal_train_inputs") or ()):
            raise expected("multimodal_train_inputs", "none, because the teacher is sent tokens only", "some")
        rows = [self._row(rollout_data, samples) for samples in rollout_data["micro_batch_indices"]]
        if self._link is None:
            self._connect(rollout_data["tokens"][0].device)
        for row in rows:
            if self._tensor.rank() == 0 and self._context.rank() == 0:
                self._link.request(row.tokens, row.edges)
            self._asked.append(row)

    def _row(self, rollout_data: dict[str, Any], samples: Sequence[int]) -> Row:
        names = ("student_validity", "teacher_validity") if self._settings.validity == "scores" else ()
        for name in names:
            if name not in rollout_data:
                raise expected(f"rollout_data[{name!r}]", "a validity for each sample with 'scores'", "none")
        return Row.of(
            [rollout_data["tokens"][sample] for sample in samples],
            [int(rollout_data["response_lengths"][sample]) for sample in samples],
            self._tensor.size() * self._args.data_pad_size_multiplier,
            (self._context.rank(), self._context.size()),
            {name: [rollout_data[name][sample] for sample in samples] for name in names},
        )

    def _connect(self, device: torch.device) -> None:
        # Without --vocab-size slime knows the vocabulary only after `init`, from the Hugging Face configuration.
        vocab_size = self._settings.vocab_size or self._args.vocab_size
        self._config = LossConfig(**self._settings.loss_arguments(), vocab_size=vocab_size)
        self._link = StudentLink.connect(
            self._settings.link,
            vocab_size=vocab_size,
            padded_vocab_size=self._args.padded_vocab_size,
            sequence_length=self._settings.sequence_length or self._args.max_position_embeddings,
            tensor_rank=self._tensor.rank(),
            tensor_size=self._tensor.size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context_rank=self._context.rank(),
            context_size=self._context.size(),
            device=device,
            tokenizer=tokenizer_of(),
        )

    def loss(self, batch: dict[str, Any], logits: Tensor, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """See the function of this name."""
        if not self._asked:  # without the hook, as in miles, which gives it no data
            if self._received == 0 and self._tensor.rank() == 0:
                _log.warning(
                    "the teacher is asked for each micro-batch only when its loss is due: no ask_ahead"
                )
            samples = range(len(batch["total_lengths"]))
            self.ask({**batch, "tokens": batch["unconcat_tokens"], "micro_batch_indices": [samples]})
        row, lengths = self._asked.popleft(), list(batch["total_lengths"])
        if lengths != row.lengths or logits.shape[1] != len(row.labels):
            what = (
                f"what the teacher was asked for, samples of {row.lengths} tokens in {len(row.labels)} rows"
            )
            raise expected("batch", what, f"samples of {lengths} tokens in {logits.shape[1]} rows")
        teacher = self._link.receive(self._received)
        self._received += 1
        out = validity_calibrated_kl(
            logits.transpose(0, 1),
            teacher,
            row.labels,
            config=self._config,
            # slime's mask of the positions that predict a token that counts, padded and split as the tokens are.
            mask=batch["full_loss_masks"].transpose(0, 1),
            # The loss needs torch's own group, which slime wraps to be able to destroy and rebuild it.
            group=getattr(self._tensor, "group", self._tensor),
            **row.validities,
        )

        def reduced(values: Tensor) -> Tensor:
            return reduce(values[row.responses, 0].float())

        total = reduced(out.loss)
        figures = {
            "loss": total,
            "divergence": reduced(out.stats.divergence),
            "weight": reduced(out.weight),
            "relative_validity": reduced(out.relative_validity),
            "invalid_teacher_rows": reduced(out.stats.skipped),
        }
        return total, {name: value.detach().clone() for name, value in figures.items()}

    def close(self) -> None:
        """Says goodbye to the teacher. Idempotent."""
        for each in (self._link, self._rendezvous):
            if each is not None:
                each.close()
        self._link = self._rendezvous = None


# slime finds functions by their names, so what they share is here.
_student: Student | None = None


def _linked() -> Student:
    if _student is None:
        raise expected(
            "--custom-megatron-init-path", "vcrd.integrations.slime.init", "another function, or none"
        )
    return _student


@dataclass(frozen=True)
class Row:
    """One micro-batch as slime gives it to the model: the samples one after another in one row.

    Each sample is padded so that context parallelism can cut it, and the row by one more sequence. tokens: [1, s], of
    all context-parallel ranks. edges: of the padded sequences, from 0 to s. lengths: of the samples.

    Of this rank's part, in the order in which it holds it: labels: [s / context, 1], each sample's next token, -1 where
    there is none. responses: the positions that predict a token of a response. validities: arguments of the loss.
    """

    tokens: Tensor
    edges: list[int]
    lengths: list[int]
    labels: Tensor
    responses: Tensor
    validities: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        samples: Sequence[Tensor],
        response_lengths: Sequence[int],
        multiple: int,
        context: tuple[int, int],
        validities: dict[str, Sequence[Any]],
    ) -> Row:
        """samples: tokens of each. multiple: of which each rank's part has tokens. context: this rank and their number.
        validities: for each sample one number, or one for each token of the response."""
        align = 2 * context[1] if context[1] > 1 else 1
        widths = [len(sample) + -len(sample) % align for sample in samples]
        tail = -sum(widths) % (multiple * context[1])
        edges = [0, *accumulate([*widths, tail] if tail else widths)]
        tokens = samples[0].new_zeros(edges[-1])
        labels, predicts = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
        spread = {name: torch.ones_like(tokens, dtype=torch.float32) for name in validities}
        for number, (start, sample) in enumerate(zip(edges, samples, strict=False)):
            last = start + len(sample) - 1
            first = last - response_lengths[number]
            tokens[start : last + 1] = sample
            labels[start:last] = sample[1:]
            predicts[first:last] = True
            for name, values in spread.items():
                values[first:last] = torch.as_tensor(validities[name][number], dtype=torch.float32)
        spans = context_rows(len(tokens), *context, edges)

        def own(values: Tensor) -> Tensor:
            return torch.cat([values[span.start : span.stop] for span in spans])

        return cls(
            tokens[None],
            edges,
            [len(sample) for sample in samples],
            own(labels)[:, None],
            own(predicts).nonzero()[:, 0],
            {name: own(values)[:, None] for name, values in spread.items()},
        )


def _refuse(args: Namespace, settings: DistillSettings) -> None:
    """ValueError for arguments of slime and settings of vcrd that the loss cannot follow."""
    if getattr(args, "recompute_loss_function", False):
        raise expected("--recompute-loss-function", "off, because an answer of the teacher comes once", "on")
    if getattr(args, "qkv_format", "thd") != "thd":
        raise expected("--qkv-format", "thd, in which samples are packed into one row", args.qkv_format)
    if getattr(args, "allgather_cp", False) and args.context_parallel_size > 1:
        raise expected(
            "--allgather-cp", "off: the teacher's answers are split in Megatron's zigzag order", "on"
        )
    if getattr(args, "use_critic", False):
        what = "another than ppo, whose critic would open a second rendezvous"
        raise expected("--advantage-estimator", what, "ppo")
    # Refused here, and not by the first loss, which comes after the first rollout.
    LossConfig(**settings.loss_arguments())
    if settings.validity == "privileged":
        what = "another one, because the teacher is asked once for each micro-batch"
        raise expected("VCRD_VALIDITY", what, settings.validity)
    if len(settings.link.teachers()) > 1:
        what = "that of one teacher, which answers every sample"
        raise expected("VCRD_ADDRESS", what, settings.link.address)
    if settings.pooled is not None:
        what = f"{DistillSettings().value(settings.pooled)}: a statistic over one micro-batch depends on its size"
        raise expected(variable_of(settings.pooled), what, settings.value(settings.pooled))
    if settings.invalid_rows != "skip":
        raise expected(
            "VCRD_INVALID_ROWS",
            "skip, because slime has no hook that could stop a step",
            settings.invalid_rows,
        )
    if settings.fused_head != "off":
        raise expected("VCRD_FUSED_HEAD", "off, because slime's loss is given logits", settings.fused_head)
    if settings.telemetry_dir is not None:
        raise expected("VCRD_TELEMETRY_DIR", "none: figures go to slime's own log", settings.telemetry_dir)
