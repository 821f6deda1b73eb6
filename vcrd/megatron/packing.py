"""Packed sequences: their edges in a Megatron batch, a teacher's inputs for them, and borders that no edge names.

Edges are the positions in a row at which its sequences begin and end. A teacher in another job is told the edges. If
positions or a mask show borders that no edge names, it would look across them, and that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.requests import Request

# Names of edges in Megatron-Core, Megatron-Bridge and NeMo, in a micro-batch and in `PackedSeqParams`. Padded edges are
# first, because tokens are placed and context parallelism cuts by them. (NeMo's padded ones are its `cu_seqlens`,
# beside `cu_seqlens_unpadded`.)
_EDGES = (
    "cu_seqlens_q_padded",
    "cu_seqlens_kv_padded",
    "cu_seqlens_padded",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "cu_seqlens",
)
# Fields that hold such fields: `PackedSeqParams`, or the arguments of one.
_HOLDERS = ("packed_seq_params", "packing_kwargs")
_ALL_KEYS = "cu_seqlens, cu_seqlens_q, their padded forms, packed_seq_params"


def field(source: Any, key: str) -> Any:
    """The value of a micro-batch or the like under this name, or None.

    source: a mapping, an object with attributes, or a tuple that begins with one of them, as NeMo's iterators yield.
    """
    if isinstance(source, (tuple, list)) and source:
        source = source[0]
    return source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)


def for_script(batch: Any) -> Any:
    """A micro-batch without the fields of this package, whose names begin with vcrd_: a script may move all others to
    its device, and these may be lists or names."""
    if not isinstance(batch, dict):
        return batch
    return {key: value for key, value in batch.items() if not str(key).startswith("vcrd_")}


def edges_in(source: Any) -> tuple[str, Any] | None:
    """Name and value of the edges in a micro-batch or among a model's arguments, unchanged; None if there are none.

    ValueError for edges under an unknown name.
    """
    for holder in (source, *(field(source, name) for name in _HOLDERS)):
        # In formats other than "thd" cu_seqlens are lengths of rows, and nothing is packed.
        if holder is None or field(holder, "qkv_format") not in (None, "thd"):
            continue
        for name in _EDGES:
            if (edges := field(holder, name)) is not None:
                return name, edges
    if isinstance(source, (tuple, list)) and source:
        source = source[0]
    strange = [k for k in source if str(k).startswith("cu_seq")] if isinstance(source, Mapping) else []
    strange = sorted(key for key in strange if source[key] is not None)
    if strange:
        raise expected(strange[0], f"edges of packed sequences under {_ALL_KEYS}", strange)
    return None


def packed(batch: Any, tokens: Tensor, arguments: Any = None) -> tuple[Tensor, Tensor]:
    """Tokens [b, s] of a Megatron micro-batch as the teacher is asked for them, and the edges of packed sequences.

    A batch without edges is asked for as it is. Packed samples become one row of b * s tokens, whose edges follow each
    other, as in Megatron. Edges: int64, ascending from 0 to b * s, empty if nothing is packed. The tokens after the
    last edge form one more sequence, as in Megatron: they are padding.

    arguments: those of the model's forward, by name. They are used if the batch has no edges.
    ValueError for edges that are not ascending integers from 0 to at most the length of what they cut.
    """
    found = edges_in(batch)
    if found is None and arguments is not None:
        found = edges_in(arguments)
    if found is None:
        return tokens, torch.empty(0, dtype=torch.int64)
    return tokens.reshape(1, -1), _merged(*found, *tokens.shape)


def _merged(name: str, given: Any, size: int, sequence: int) -> Tensor:
    """The edges of `size` rows as edges of the one row that they become."""
    edges = torch.as_tensor(given).cpu()
    if edges.is_floating_point() or edges.dtype == torch.bool or not edges.numel():
        raise expected(name, "integer edges", f"{edges.dtype} {list(edges.shape)}")
    rows = edges.long().reshape(-1, edges.shape[-1] if edges.dim() else 1)
    if len(rows) not in (1, size):
        raise expected(name, f"edges [n] or [{size}, n] for tokens {[size, sequence]}", list(edges.shape))
    together = len(rows) == 1
    width = size * sequence if together else sequence
    merged = []
    for number, row in enumerate(rows):
        # Rows are padded so that they can be stacked: with the length of the sample, or with -1.
        row = row[: int((row >= 0).cumprod(0).sum())]
        wrong = not len(row) or row[0] != 0 or row[-1] > width or bool((row.diff() < 0).any())
        wrong = wrong or bool((rows[number][len(row) :] >= 0).any())
        # Edges of all rows together end at the width of all; otherwise they are those of the first row.
        if wrong or (together and size > 1 and row[-1] != width):
            raise expected(
                name,
                f"edges that ascend from 0 to {width} for tokens {[size, sequence]}",
                rows[number].tolist()[:16],
            )
        merged.append(row + width * number)
    return torch.cat([*merged, torch.tensor([size * sequence])]).unique_consecutive()


class PackedInputs:
    """Positions and masks for a teacher's model.

    Each packed sequence begins at position 0 and sees only itself. If attention is Transformer Engine's, it is given
    `PackedSeqParams`. Other attention is given a mask [1, 1, s, s], true where a token may not look.
    """

    def __init__(self, chunk: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._by_engine = by_engine(chunk)
        self._ignores_masks = device.type == "cuda" and bool(
            getattr(chunk.config, "masked_softmax_fusion", False)
        )
        self._recurrent = sorted(
            {
                type(module).__name__
                for module in chunk.modules()
                if type(module).__name__ in ("MambaMixer", "GatedDeltaNet")
            }
        )

    def of(self, request: Request) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Positions [b, s], the attention mask or None, and further keyword arguments of the model's forward.

        ValueError for a model that cannot keep packed sequences apart.
        """
        batch, sequence = request.tokens.shape
        positions = torch.arange(sequence, device=self._device)
        edges = request.boundaries.to(self._device)
        if not len(edges):
            return positions.expand(batch, sequence), None, {}
        which = torch.bucketize(positions, edges[1:], right=True)
        own = (positions - edges[which]).expand(batch, sequence)
        if self._by_engine:
            return own, None, {"packed_seq_params": self._parameters(edges, sequence)}
        if self._recurrent:
            raise expected(
                "model",
                (
                    f"attention of Transformer Engine beside {self._recurrent[0]} for packed sequences, because a "
                    "mask does not reset its state"
                ),
                "Megatron's local attention",
            )
        if self._ignores_masks:
            raise expected(
                "masked_softmax_fusion",
                "False for packed sequences without Transformer Engine",
                "True, whose causal kernel reads no mask (--no-masked-softmax-fusion)",
            )
        hidden = (which[:, None] != which[None, :]) | (positions[:, None] < positions[None, :])
        return own, hidden[None, None], {}

    def _parameters(self, edges: Tensor, sequence: int) -> Any:
        from megatron.core.packed_seq_params import PackedSeqParams

        extra = {}
        if "MambaMixer" in self._recurrent and hasattr(PackedSeqParams, "total_tokens"):
            # If Megatron has this field, its Mamba layers reset their state at edges only with it.
            extra["total_tokens"] = sequence
        edges = edges.int()
        longest = int(edges.diff().max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=edges,
            cu_seqlens_kv=edges,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            **extra,
        )


def by_engine(chunk: torch.nn.Module) -> bool:
    """Whether attention is Transformer Engine's, which reads `PackedSeqParams`, and no mask but its causal one."""
    # The configuration's transformer_impl may differ from the modules that run.
    names = {type(module).__name__ for module in chunk.modules()}
    return any(name.startswith("TE") and "Attention" in name for name in names)


_WANTED = (
    "or the edges of the sequences that are packed into a row (cu_seqlens in the micro-batch, packed_seq_params among "
    "the model's arguments)"
)
_POSITIONS = (
    f"position_ids: expected positions that ascend by one, {_WANTED}, got others: the teacher counts from 0 and would "
    "look across a border that it does not know"
)
_MASK = (
    f"attention_mask: expected a causal mask, {_WANTED}, got another one: the teacher's mask is causal and it would "
    "look where the student may not"
)


class Doubts:
    """Possible errors: bool tensors on a device, each with the message that holds if it is true."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._flags: list[Tensor] = []
        self._arrived: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, flag: Tensor, message: str) -> None:
        self._flags.append(flag)
        self._messages.append(message)

    def send(self) -> None:
        """Starts to copy the flags to the host, so that `check` waits for them only and not for later work."""
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
        """ValueError with the first message whose flag is true."""
        if self._event is not None:
            self._event.synchronize()
        found = [] if self._arrived is None else self._arrived.tolist()
        for message, true in zip(self._messages, found, strict=False):
            if true:
                raise ValueError(message)


def look_for_other_edges(doubts: Doubts, name: str, given: Any, edges: Tensor, width: int) -> None:
    """Adds a doubt: the model is given, under `name`, other edges than the teacher was told."""
    given = torch.as_tensor(given)
    doubts.add(
        (_starts(given, width) != _starts(edges.to(given.device, non_blocking=True), width)).any(),
        f"{name}: expected among the model's arguments the edges of the micro-batch, which the teacher was told, "
        "got others",
    )


def _starts(edges: Tensor, width: int) -> Tensor:
    """bool [width]: where a sequence begins. Padding of the edges, -1 or the width, begins none."""
    marks = torch.zeros(width + 1, dtype=torch.bool, device=edges.device)
    return marks.index_fill_(0, edges.flatten().long().clamp(0, width), True)[:width]


def refuse_other_split(batch: Any, arguments: Any) -> None:
    """ValueError if context parallelism cuts packed sequences otherwise than `vcrd.link.plan.context_rows` does."""
    for source in (batch, arguments, field(arguments, "packed_seq_params")):
        if (mode := field(source, "cp_partition_mode")) not in (None, "zigzag"):
            raise expected(
                "cp_partition_mode", "'zigzag', by which the teacher's answers are cut", repr(mode)
            )


def look_for_borders(
    doubts: Doubts, source: Any, edges: Tensor, columns: Tensor, rows: int, counted: tuple[Any, ...]
) -> None:
    """Adds a doubt for positions and one for a mask in `source` that contradict `edges`.

    source: a micro-batch, or the model's arguments. `position_ids` and `attention_mask` are read if it has them and
    their shapes are known, such as [b, s]. edges: as from `packed`. columns: int64, the positions that each of the
    `rows` rows holds; all of them without context parallelism. counted: where loss_mask and labels are found. The
    tokens after the last one that counts are padding and are not checked.
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
                counts &= (
                    found != 0 if name == "loss_mask" else found >= 0
                )  # -100 marks tokens that do not count
    index = torch.arange(len(columns), device=columns.device)
    return torch.where(counts, index, -1).amax(1)


def _restarts(positions: Tensor, edges: Tensor, columns: Tensor, last: Tensor) -> Tensor | None:
    """Whether positions do not ascend by one somewhere other than at an edge."""
    shape = (len(last), len(columns))
    if positions.numel() == len(columns):
        positions = positions.reshape(1, -1)
    elif positions.numel() == shape[0] * shape[1]:
        positions = positions.reshape(shape)
    else:  # positions of other axes, such as of images
        return None
    which = torch.bucketize(columns, edges[1:], right=True)
    index = torch.arange(1, len(columns), device=columns.device)
    odd = (positions.diff(dim=1) != columns.diff()) & (which.diff() == 0) & (index <= last[:, None])
    return odd.any()


def _blocks(mask: Tensor, edges: Tensor, columns: Tensor, last: Tensor) -> Tensor | None:
    """Whether a mask is not causal. Its value for "may look" is the one of the first token for itself."""
    if len(edges) > 2:  # the edges define what tokens see, and no mask beside them is read
        return None
    width = len(columns)
    index = torch.arange(width, device=columns.device)
    before_last = index <= last[:, None]
    if mask.shape in (
        (len(last), width),
        (len(last), 1, 1, width),
    ):  # which tokens exist
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
