"""Validity that neither model computes: steps and scores in the micro-batch, and a verifier's judgements.

Megatron broadcasts its own keys of a micro-batch from rank to rank, and no others. So the other fields are read where
the micro-batch is drawn, on tensor rank 0 of the last stage, and one broadcast takes them to the other tensor ranks.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected, wrong_type
from vcrd.link.plan import context_rows
from vcrd.loss.divergence import DivergenceStats
from vcrd.megatron.layout import Layout
from vcrd.megatron.packing import field, for_script, packed
from vcrd.megatron.prefetch import TokensOf, tokens_in
from vcrd.megatron.teacher_context import without_fields
from vcrd.settings import DistillSettings

Verifier = Callable[..., tuple[Tensor, Tensor]]

# Keys in a micro-batch, each of an argument of the loss, [b, s] like its tokens.
STEPS_KEY = "vcrd_steps"
SCORE_KEYS = ("vcrd_student_validity", "vcrd_teacher_validity")
MASK_KEY = "loss_mask"  # Megatron's own

# Values of a token if a message could not be made: no step; both models equally valid, and the token counts.
_NO_STEP, _ONE = -1, int(torch.ones((), dtype=torch.float32).view(torch.int32))
_HEADER = 2  # numbers before the body: bytes of an error message, 0 if there is no error; microseconds


class ExternalValidity:
    """On every rank of the last stage, for each micro-batch: `watched`, then `arguments` of the loss.

    Fields are integer steps and float scores [b, s], one per token, in what the data iterator yields: `STEPS_KEY` if
    the first micro-batch has them (`take_steps`), `SCORE_KEYS` if the settings' validity is "scores". Each sample
    numbers its own steps. With context parallelism each rank takes the positions that Megatron gives it. After
    `take_mask` the loss mask, `MASK_KEY`, is a field too, for scripts that do not give it to the model (`LossMask`).

    verifier: called on tensor rank 0 with CPU tensors (tokens, student_action, teacher_action), each int64 [b, s], and
    with the micro-batch as it was drawn if the verifier has a parameter named `batch`. Packed samples are one row, as
    in Megatron. An action is the most probable token after `tokens` up to and including its position, also with the
    payload "topk". It is -1 if there is nothing to judge: the loss mask is 0, another context-parallel rank judges it,
    or the teacher's action is not known. The verifier returns the validity of the student's and of the teacher's
    action, each [b, s] in [0, 1]; values where the action is -1 are not read.

    Collectives: with tensor parallelism, one broadcast per micro-batch if there are fields, and one if there is a
    verifier. An error on tensor rank 0 is raised on every tensor rank. Fields are copied to a GPU without waiting
    for it: those of the first micro-batch are checked at once, and later ones with the next micro-batch. Until then
    both models of a wrong one count as equally valid. A verifier waits for the device.
    """

    def __init__(self, settings: DistillSettings, tokens_of: TokensOf, verifier: Verifier | None) -> None:
        if verifier is not None and not callable(verifier):
            raise wrong_type("verifier", "a callable", verifier)
        own = settings.validity in ("scores", "privileged") or callable(settings.validity)
        if verifier is not None and own:
            raise ValueError(
                f"verifier: expected none with the settings' validity {settings.validity!r}, "
                "for a verifier takes its place"
            )
        scores = settings.validity == "scores"
        self.keys = SCORE_KEYS if scores else ()
        self.looks_for_mask = False  # whether `why_no_mask` may still be called
        self._verifier = verifier
        self._wants_batch = verifier is not None and "batch" in _parameters(verifier)
        self._tokens_of = tokens_of
        self._layout: Layout | None = None
        self._drawn: list[Any] = []
        # Arguments of the model's forward for this micro-batch, which may have the edges of packed sequences.
        self.given: dict[str, Any] = {}
        self._late: _Late | None = None  # the last message, if it is not yet checked
        self._sent = 0
        self._defers = False  # whether fields are checked with the next micro-batch
        self._seconds = 0.0

    @property
    def used(self) -> bool:
        return bool(self.keys) or self._verifier is not None

    def place(self, layout: Layout) -> None:
        """Tells this rank's place, before the first micro-batch."""
        self._layout = layout
        self._defers = layout.device.type == "cuda"

    def watched(self, data_iterator: Any) -> Any:
        """The iterator for the script to draw this micro-batch from. It hides the fields from the script."""
        self._drawn = []
        if self._layout.tensor_rank != 0 or data_iterator is None:
            return without_fields(data_iterator)
        return self._watch(data_iterator)

    def _watch(self, source: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                batch = next(source)
            except StopIteration:
                return
            # A copy, because Megatron's functions remove and move the entries of the dictionary.
            self._drawn.append(dict(batch) if isinstance(batch, dict) else batch)
            if isinstance(batch, dict):
                self._refuse_late_steps(batch)
            yield for_script(batch)

    def _refuse_late_steps(self, batch: dict[Any, Any]) -> None:
        if STEPS_KEY in batch and STEPS_KEY not in self.keys and not self.looks_for_mask:
            raise expected(STEPS_KEY, "in every micro-batch or in none", "them in one, and none in the first")

    def has_steps(self) -> bool:
        """On tensor rank 0: whether the micro-batch that was drawn has reasoning steps."""
        return any(isinstance(batch, dict) and STEPS_KEY in batch for batch in self._drawn)

    def take_steps(self) -> None:
        """From now on `arguments` also returns the reasoning steps of the micro-batch. Call it before `take_mask`."""
        self.keys += (STEPS_KEY,)

    def why_no_mask(self, shape: torch.Size) -> str:
        """On tensor rank 0: why the micro-batch of labels [b, s] has no loss mask, "" if it has one."""
        try:
            self._mask(shape)
        except Exception as error:  # any error, since the other ranks wait for this one
            return str(error)
        return ""

    def take_mask(self) -> None:
        """From now on `arguments` also returns the loss mask of the micro-batch."""
        self.keys += (MASK_KEY,)

    def arguments(self, labels: Tensor, loss_mask: Tensor | None) -> dict[str, Any]:
        """Arguments of `validity_calibrated_kl`, [s, b], for the micro-batch of this rank's labels [b, s].

        After `take_mask` also `loss_mask`, float32 [b, s], if the given one is None.

        ValueError, on every tensor rank, for fields that are missing or wrong, in this micro-batch or the previous one.
        """
        if not self.used:
            return {}
        self.check()
        found: dict[str, Any] = {}
        if self.keys:
            count = len(self.keys) * labels.numel()
            sent = self._share(lambda: self._fields(labels.shape), count, ValueError, self._neutral(labels))
            rows = dict(zip(self.keys, sent.view(len(self.keys), *labels.shape), strict=True))
            if STEPS_KEY in rows:
                found["steps"] = rows[STEPS_KEY].t().long()
                split = self._layout.context_size > 1
                found["steps_group"] = self._layout.groups.context if split else None
            for key, name in zip(SCORE_KEYS, ("student_validity", "teacher_validity"), strict=True):
                if key in rows:
                    found[name] = rows[key].t().contiguous().view(torch.float32)
            if MASK_KEY in rows and loss_mask is None:
                found["loss_mask"] = loss_mask = rows[MASK_KEY].view(torch.float32)
        if self._verifier is not None:
            found["validity"] = lambda stats: self._judged(stats, labels, loss_mask)
        return found

    def take_seconds(self) -> float:
        """Seconds that tensor rank 0 spent in the verifier since the last call, the same on every tensor rank."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def check(self) -> None:
        """ValueError, on every tensor rank, if the last micro-batch's fields were wrong and no error was raised yet."""
        late, self._late = self._late, None
        if late is not None:
            late.check()

    def _judged(
        self, stats: DivergenceStats, labels: Tensor, loss_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sent = self._share(lambda: self._judge(stats, labels, loss_mask), 2 * labels.numel(), RuntimeError)
        student, teacher = sent.view(2, *labels.shape).transpose(1, 2).contiguous().view(torch.float32)
        return student, teacher

    def _share(
        self,
        make: Callable[[], tuple[Tensor, float]],
        count: int,
        error: type[Exception],
        neutral: Tensor | None = None,
    ) -> Tensor:
        """int32 [count] that `make` returns, with seconds, on tensor rank 0; the same on every tensor rank.

        Raises `error` on every tensor rank if `make` failed. neutral: int32 [count] that takes the place of the values
        in that case, if the check comes with the next micro-batch.
        """
        layout, group = self._layout, self._layout.tensor_group
        message = torch.zeros(_HEADER + count, dtype=torch.int32)
        cause = None
        if layout.tensor_rank == 0:
            try:
                body, seconds = make()
                message[1] = min(int(seconds * 1e6), 2**31 - 1)
                message[_HEADER:] = body.reshape(-1)
            except Exception as failure:
                cause = failure
                _write(message, str(failure) if error is ValueError else f"verifier: {_message_of(failure)}")
            if layout.device.type == "cuda":
                message = message.pin_memory()
        known = message
        message = message.to(layout.device, non_blocking=True)
        if group is not None:
            dist.broadcast(message, dist.get_global_rank(group, 0), group=group)
            known = message
        self._sent += 1
        late = _Late(known, error, cause)  # without other ranks the host knows, and need not wait
        # A dataset that lacks a field lacks it from the start: only the first message is waited for.
        if self._defers and neutral is not None and group is not None and self._sent > 1:
            self._late = late
            return torch.where(message[0] == 0, message[_HEADER:], neutral.to(message.device))
        late.check()
        if self._verifier is not None:
            self._seconds += int(known[1]) / 1e6
        return message[_HEADER:]

    def _neutral(self, labels: Tensor) -> Tensor:
        values = [_NO_STEP if key == STEPS_KEY else _ONE for key in self.keys]
        return torch.tensor(values, dtype=torch.int32).repeat_interleave(labels.numel())

    def _drawn_batch(self) -> Any:
        if len(self._drawn) != 1:
            raise expected(
                "data_iterator",
                "forward_step to draw one micro-batch from it per call on tensor rank 0 of the last stage",
                len(self._drawn),
            )
        return self._drawn[0]

    def _batch(self, shape: torch.Size) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The drawn micro-batch, its tokens [b, s], the edges of packed sequences, and this rank's columns."""
        batch = self._drawn_batch()
        tokens, edges = packed(batch, tokens_in(batch, self._tokens_of), self.given)
        return batch, tokens, edges, self._columns("tokens", tokens, edges, shape)

    def _columns(self, name: str, values: Tensor, edges: Tensor, shape: torch.Size) -> Tensor:
        """This rank's columns of values [b, s] of the micro-batch; ValueError unless they fit labels of `shape`."""
        layout = self._layout
        if (values.shape[0], values.shape[1]) != (shape[0], shape[1] * layout.context_size):
            raise expected(
                name,
                (
                    f"{[shape[0], shape[1] * layout.context_size]} in the micro-batch, for the labels that the model "
                    "was given"
                ),
                list(values.shape),
            )
        spans = context_rows(values.shape[1], layout.context_rank, layout.context_size, edges.tolist())
        return torch.cat([torch.arange(span.start, span.stop) for span in spans])

    def _fields(self, shape: torch.Size) -> tuple[Tensor, float]:
        rows = []
        own = [key for key in self.keys if key != MASK_KEY]
        if own:
            batch, tokens, edges, columns = self._batch(shape)
        for key in own:
            value = _field(batch, key, tokens_in(batch, self._tokens_of).shape).reshape(tokens.shape)
            value = _numbered(value, edges) if key == STEPS_KEY else _score(key, value).view(torch.int32)
            rows.append(value[:, columns])
        if MASK_KEY in self.keys:
            rows.append(self._mask(shape).view(torch.int32))
        return torch.stack(rows), 0.0

    def _mask(self, shape: torch.Size) -> Tensor:
        """The loss mask of this rank's labels [b, s], float32. Reads no tokens, which may have no known key."""
        batch = self._drawn_batch()
        value = field(batch, MASK_KEY)
        if value is None:
            found = f"the keys {sorted(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
            raise expected(MASK_KEY, "in the micro-batch", found)
        if not isinstance(value, Tensor) or value.dim() != 2:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise expected(MASK_KEY, "a tensor [b, s] in the micro-batch", got)
        value, edges = packed(batch, value.detach().cpu().float(), self.given)
        return value[:, self._columns(MASK_KEY, value, edges, shape)].contiguous()

    def _judge(self, stats: DivergenceStats, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        batch, tokens, _, columns = self._batch(labels.shape)
        actions = torch.stack([stats.student_action.t(), stats.teacher_action.t()])
        known = (actions >= 0).all(0)
        actions = torch.where(known if mask is None else known & (mask != 0), actions, -1)
        whole = torch.full((2, *tokens.shape), -1)
        whole[:, :, columns] = actions.cpu()
        extra = {"batch": batch} if self._wants_batch else {}
        started = time.perf_counter()
        answer = self._verifier(tokens.cpu(), whole[0].clone(), whole[1].clone(), **extra)
        seconds = time.perf_counter() - started
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise ValueError(f"expected a return of (student, teacher), got {type(answer).__name__}")
        rows = []
        for name, value, action in zip(("student", "teacher"), answer, whole, strict=True):
            if not isinstance(value, Tensor) or value.shape != tokens.shape:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"expected the {name}'s validity as a tensor {list(tokens.shape)}, got {got}"
                )
            value = torch.where(action >= 0, value.detach().cpu().float(), 1.0)
            rows.append(_score(f"the {name}'s validity", value).view(torch.int32)[:, columns])
        return torch.stack(rows), seconds


class _Late:
    """A message that is being copied to the host, and the error that it may hold."""

    def __init__(self, message: Tensor, error: type[Exception], cause: Exception | None) -> None:
        self._message, self._error, self._cause = message, error, cause
        self._event = None
        self._length = message[:1]
        if message.device.type == "cuda":
            self._length = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self._length.copy_(message[:1], non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def check(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        length = int(self._length)
        if length:
            raise self._error(_read(self._message.cpu(), length)) from self._cause


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a callable written in C need not have one
        return ()


def _message_of(failure: Exception) -> str:
    name = type(failure).__name__
    return str(failure) if type(failure) is ValueError else f"{name}: {failure}"


def _write(message: Tensor, error: str) -> None:
    """Puts the error message in place of the body, cut to its size."""
    text = error.encode("utf-8", "replace")[: 4 * (len(message) - _HEADER)] or b"?"
    padded = bytearray(text.ljust(-(-len(text) // 4) * 4))
    message[0] = len(text)
    message[_HEADER : _HEADER + len(padded) // 4] = torch.frombuffer(padded, dtype=torch.int32)


def _read(message: Tensor, length: int) -> str:
    words = message[_HEADER : _HEADER + -(-length // 4)]
    return bytes(words.contiguous().view(torch.uint8).tolist())[:length].decode("utf-8", "replace")


def _field(batch: Any, key: str, shape: torch.Size) -> Tensor:
    if not isinstance(batch, dict) or key not in batch:
        found = f"the keys {sorted(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise expected(key, f"in the micro-batch, a tensor {list(shape)}", found)
    value = batch[key]
    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise expected(key, f"the tokens' shape {list(shape)}", got)
    return value.detach().cpu()


def _score(name: str, value: Tensor) -> Tensor:
    """float32; ValueError unless all are in [0, 1]."""
    value = value.float().contiguous()
    if value.numel() and not (value.min() >= 0 and value.max() <= 1):
        raise expected(name, "values in [0, 1]", f"{float(value.min()):g} to {float(value.max()):g}")
    return value


def _numbered(steps: Tensor, edges: Tensor) -> Tensor:
    """int32 [b, s]: steps numbered from 0 through the whole micro-batch, each of one sample; -1 for no step."""
    if steps.is_floating_point() or steps.dtype == torch.bool:
        raise expected(STEPS_KEY, "integers", steps.dtype)
    steps = steps.long()
    if steps.numel() and (steps.min() < -1 or steps.max() >= 2**31):
        raise expected(STEPS_KEY, "values from -1 to 2^31 - 1", f"{int(steps.min())} to {int(steps.max())}")
    size, sequence = steps.shape
    sample = torch.arange(size)[:, None].expand(size, sequence)
    if len(edges):
        sample = torch.bucketize(torch.arange(sequence), edges[1:], right=True)[None].expand(size, sequence)
    named = steps >= 0
    numbered = torch.full_like(steps, -1)
    numbered[named] = (sample * 2**32 + steps)[named].unique(return_inverse=True)[1]
    return numbered.int()
