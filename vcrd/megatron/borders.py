"""Borders of packed sequences that positions or a mask show and no edges: a linked teacher would look across them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcrd.megatron.packing import field

_WANTED = (
    "or the edges of the sequences that are packed into a row (cu_seqlens in the micro-batch, packed_seq_params among "
    "the model's arguments)"
)
_POSITIONS = (
    f"position_ids: expected positions that ascend by one, {_WANTED}, got others: the teacher, which counts from 0, "
    "would look across a border that it does not know of"
)
_MASK = (
    f"attention_mask: expected a causal mask, {_WANTED}, got another one: the teacher, whose mask is causal, would "
    "look where the student may not"
)


class Doubts:
    """Findings on a device, each a bool tensor and the sentence that it stands for where it is true."""

    def __init__(self) -> None:
        self._sentences: list[str] = []
        self._flags: list[Tensor] = []
        self._arrived: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, flag: Tensor, sentence: str) -> None:
        self._flags.append(flag)
        self._sentences.append(sentence)

    def send(self) -> None:
        """Starts the way of the flags to the host: `check` then waits for them alone, not for what came after."""
        if not self._flags:
            return
        flags = torch.stack([flag.to(self._flags[0].device, non_blocking=True) for flag in self._flags])
        self._arrived = flags
        if flags.is_cuda:
            self._arrived = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._arrived.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def check(self) -> None:
        """ValueError with the first sentence that is true."""
        if self._event is not None:
            self._event.synchronize()
        found = [] if self._arrived is None else self._arrived.tolist()
        for sentence, true in zip(self._sentences, found, strict=False):
            if true:
                raise ValueError(sentence)


def look_for_other_edges(doubts: Doubts, name: str, given: Any, edges: Tensor, width: int) -> None:
    """Adds whether the model is given other edges, under `name`, than those that the teacher was told."""
    given = torch.as_tensor(given)
    doubts.add(
        (_starts(given, width) != _starts(edges.to(given.device, non_blocking=True), width)).any(),
        f"{name}: expected among the model's arguments the edges of the micro-batch, which the teacher was told, "
        "got others",
    )


def _starts(edges: Tensor, width: int) -> Tensor:
    """[width]: where a sequence begins. What fills edges up, -1 or the width, begins none."""
    marks = torch.zeros(width + 1, dtype=torch.bool, device=edges.device)
    return marks.index_fill_(0, edges.flatten().long().clamp(0, width), True)[:width]


def refuse_other_split(batch: Any, arguments: Any) -> None:
    """ValueError where context parallelism cuts packed sequences otherwise than `vcrd.link.plan.context_rows` does."""
    for source in (batch, arguments, field(arguments, "packed_seq_params")):
        if (mode := field(source, "cp_partition_mode")) not in (None, "zigzag"):
            raise ValueError(
                f"cp_partition_mode: expected 'zigzag', as the teacher's answers are cut, got {mode!r}"
            )


def look_for_borders(
    doubts: Doubts, source: Any, edges: Tensor, columns: Tensor, rows: int, counted: tuple[Any, ...]
) -> None:
    """Adds what the positions and the mask in `source` say against `edges`.

    source: a micro-batch, or the model's arguments; `position_ids` and `attention_mask` [b, s] and so on are looked
    at where it has them and their shapes are known. edges: as from `packed`. columns: int64, the positions that each of
    the `rows` rows holds, all of them but for context parallelism. counted: of the sources of loss_mask and labels
    in them; what follows the last token that counts is padding, and may be whatever it is.
    """
    positions, mask = field(source, "position_ids"), field(source, "attention_mask")
    for tensor, look in ((positions, _restarts), (mask, _blocks)):
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            continue
        here = columns.to(tensor.device)
        last = _last_counted(counted, rows, here)
        flag = look(tensor, edges.to(tensor.device), here, last)
        if flag is not None:
            doubts.add(flag, _POSITIONS if look is _restarts else _MASK)


def _last_counted(sources: tuple[Any, ...], rows: int, columns: Tensor) -> Tensor:
    """[rows]: the index in `columns` of each row's last token that counts, -1 where none does."""
    counts = torch.ones(rows, len(columns), dtype=torch.bool, device=columns.device)
    for source in sources:
        for name in ("loss_mask", "labels"):
            found = field(source, name)
            if isinstance(found, Tensor) and found.numel() == counts.numel():
                found = found.reshape(counts.shape).to(counts.device, non_blocking=True)
                counts &= found != 0 if name == "loss_mask" else found >= 0  # -100 marks what does not count
    index = torch.arange(len(columns), device=columns.device)
    return torch.where(counts, index, -1).amax(1)


def _restarts(positions: Tensor, edges: Tensor, columns: Tensor, last: Tensor) -> Tensor | None:
    """Whether positions go on otherwise than by one anywhere but at an edge."""
    shape = (len(last), len(columns))
    if positions.numel() == len(columns):
        positions = positions.reshape(1, -1)
    elif positions.numel() == shape[0] * shape[1]:
        positions = positions.reshape(shape)
    else:  # of other axes, as of images
        return None
    which = torch.bucketize(columns, edges[1:], right=True)
    index = torch.arange(1, len(columns), device=columns.device)
    odd = (positions.diff(dim=1) != columns.diff()) & (which.diff() == 0) & (index <= last[:, None])
    return odd.any()


def _blocks(mask: Tensor, edges: Tensor, columns: Tensor, last: Tensor) -> Tensor | None:
    """Whether a mask is not causal. What it holds for "may look" is what the first token holds for itself."""
    if len(edges) > 2:  # these say who sees whom, and a mask beside them is not read
        return None
    width = len(columns)
    index = torch.arange(width, device=columns.device)
    before_last = index <= last[:, None]
    if mask.shape in ((len(last), width), (len(last), 1, 1, width)):  # which tokens are there, for all to see
        mask = mask.reshape(len(last), width)
        return ((mask != mask.gather(1, last.clamp(min=0)[:, None])) & before_last).any()
    if mask.dim() < 2 or mask.shape[-2] != width or mask.shape[-1] < width:
        return None
    if mask.dim() == 4:
        mask = mask[:, 0]
    mask = mask.reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, len(last)):
        return None
    keys = torch.arange(mask.shape[-1], device=columns.device)
    hidden = mask != mask[:, :1, columns[:1]]
    reach = torch.where(last >= 0, columns[last.clamp(min=0)], -1)
    odd = (hidden != (keys > columns[:, None])) & before_last[:, :, None]
    return (odd & (keys <= reach[:, None])[:, None, :]).any()
