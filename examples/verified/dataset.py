"""The student's own samples, one JSON object per line, as a data set for Megatron.

    {"prompt": [3, 11, 4, 16], "tokens": [3, 11, 4, 14, 7, 15, 17], "steps": [0, 0, 0, 0, 0, 0, 1],
     "student_validity": [1, 1, 0.5, ...], "teacher_validity": [1, 1, 1, ...]}

prompt and tokens are token ids: the input and the output of the sampler. The other lists have the length of `tokens`.
Their entry i is for the prefix prompt + tokens[:i], after which tokens[i] was sampled: the reasoning step of that token
(-1 for none), and the validity in [0, 1] of the proposals of student and teacher. A line may have more keys.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

_MAGIC = 0x76637264_0001  # identifies the index and its version
_HEADER = 7  # magic, size and time of the file, checked fields (steps, scores, vocabulary), number of lines


def write_samples(path: str | Path, samples: Iterable[dict[str, Any]]) -> None:
    """Writes the samples, one per line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)


class Samples(Dataset):
    """Samples of a file in the form of Megatron's data sets. Only a memory-mapped index of the file is in memory.

    An item has tokens, labels, position_ids int64 [s] and loss_mask float32 [s], which is 1 if the label is a sampled
    token; with `steps`, vcrd_steps int64 [s]; with `scores`, vcrd_student_validity and vcrd_teacher_validity
    float32 [s]; with `attention_mask`, a mask bool [1, s, s] that is true where a position may not attend. Longer
    samples are cut to s + 1 tokens.

    path: the file. The first process that opens it reads and checks every line, and writes the index `<path>.index`.
        Several processes may do this at once. A changed file is read again.
    sequence_length: s. padding: the token for padding.
    samples: length of the data set. The file is repeated, and shuffled each time with `seed`. None: once, in the order
        of the file.
    steps: whether every line has steps. None: whether the first line has them.
    vocab_size: token ids must be below it; None: any.

    ValueError for a bad line names the file, the line and what was expected.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        *,
        padding: int = 0,
        steps: bool | None = True,
        scores: bool = True,
        attention_mask: bool = False,
        samples: int | None = None,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._length = sequence_length
        self._padding = padding
        if steps is None:
            steps = self._begins_with_steps()
        self._check = {"steps": steps, "scores": scores, "vocab_size": vocab_size}
        self._mask = (
            torch.ones(1, sequence_length, sequence_length, dtype=torch.bool).triu(1)
            if attention_mask
            else None
        )
        self._seed = seed
        self._offsets = self._index()
        self._lines = len(self._offsets) - 1
        if not self._lines:
            raise ValueError(f"{self.path}: expected at least one sample, got none")
        self._samples = self._lines if samples is None else samples
        self._shuffle = samples is not None
        self._order: tuple[int, Tensor | None] = (-1, None)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < self._samples:
            raise IndexError(item)
        sample = self._read(self._line(int(item)))
        prompt, response, length = len(sample["prompt"]), sample["tokens"], self._length
        sequence = torch.full((length + 1,), self._padding)
        whole = torch.tensor((sample["prompt"] + response)[: length + 1])
        sequence[: len(whole)] = whole
        # Position j predicts token j + 1, so the first sampled token is the label of the last position of the prompt.
        spoken = slice(prompt - 1, len(whole) - 1)
        count = len(whole) - prompt

        def spread(values: list, default: float, dtype: torch.dtype) -> Tensor:
            row = torch.full((length,), default, dtype=dtype)
            row[spoken] = torch.tensor(values[:count], dtype=dtype)
            return row

        found = {
            "tokens": sequence[:-1].clone(),
            "labels": sequence[1:].clone(),
            "loss_mask": spread([1.0] * count, 0.0, torch.float32),
            "position_ids": torch.arange(length),
        }
        if self._check["steps"]:
            found["vcrd_steps"] = spread(sample["steps"], -1, torch.int64)
        if self._check["scores"]:
            for name in ("student_validity", "teacher_validity"):
                found[f"vcrd_{name}"] = spread(sample[name], 1.0, torch.float32)
        if self._mask is not None:
            found["attention_mask"] = self._mask
        return found

    def _begins_with_steps(self) -> bool:
        with open(self.path, "rb") as file:
            try:
                first = json.loads(file.readline())
            except ValueError:  # the index reports the error
                return False
        return isinstance(first, dict) and "steps" in first

    def _line(self, item: int) -> int:
        if not self._shuffle:
            return item
        epoch, place = divmod(item, self._lines)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = (epoch, torch.randperm(self._lines, generator=generator))
        return int(self._order[1][place])

    def _read(self, line: int) -> dict[str, Any]:
        start, stop = self._offsets[line].tolist(), self._offsets[line + 1].tolist()
        # Opened again in each process, because forked loader processes share the position of an open file.
        with open(self.path, "rb") as file:
            file.seek(start)
            return self._parse(file.read(stop - start), line + 1)

    def _parse(self, text: bytes, line: int) -> dict[str, Any]:
        try:
            sample = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{self.path}, line {line}: expected a JSON object, got another text ({error})"
            ) from None
        wrong = _wrong(sample, self._length, **self._check)
        if wrong:
            raise ValueError(f"{self.path}, line {line}: {wrong}")
        return sample

    def _index(self) -> Tensor:
        """The start of each line and the end of the last one, int64."""
        index = self.path.with_name(self.path.name + ".index")
        about = self.path.stat()
        check = self._check
        header = [_MAGIC, about.st_size, about.st_mtime_ns, int(check["steps"]), int(check["scores"])]
        header.append(self._length << 32 | (check["vocab_size"] or 0))
        try:
            found = _mapped(index)
        except (OSError, RuntimeError):
            found = torch.empty(0)
        if found[: len(header)].tolist() == header and len(found) == _HEADER + int(found[len(header)]) + 1:
            return found[_HEADER:]
        offsets = array("q", [0])
        with open(self.path, "rb") as file:
            for line, text in enumerate(file, 1):
                self._parse(text, line)
                offsets.append(offsets[-1] + len(text))
        # Renamed when complete, so that a process finds a complete index or none.
        with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
            array("q", [*header, len(offsets) - 1]).tofile(file)
            offsets.tofile(file)
        os.replace(file.name, index)
        return _mapped(index)[_HEADER:]


def provider(path: str | Path, **options: Any) -> Callable[..., tuple[Samples, None, None]]:
    """A `train_valid_test_datasets_provider` for Megatron's `pretrain`, with samples for training only.

    options: of `Samples`. Sequence length, seed, number of samples and attention mask come from Megatron's arguments.
    """

    def train_valid_test_datasets(counts: tuple, vp_stage: int | None = None) -> tuple[Samples, None, None]:
        from megatron.training import get_args

        args = get_args()
        chosen = {
            "samples": counts[0],
            "seed": args.seed,
            "attention_mask": args.create_attention_mask_in_dataloader,
        }
        return Samples(path, args.seq_length, **{**chosen, **options}), None, None

    return train_valid_test_datasets


def _mapped(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size // 8, dtype=torch.int64)


def _wrong(sample: Any, length: int, steps: bool, scores: bool, vocab_size: int | None) -> str | None:
    """The error of a line, or None."""
    if not isinstance(sample, dict):
        return f"expected a JSON object, got {type(sample).__name__}"
    for name in ("prompt", "tokens"):
        tokens = sample.get(name)
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            return f"{name}: expected a list of at least one token id, got {_short(tokens)}"
        worst = max(tokens) if vocab_size is not None and max(tokens) >= vocab_size else min(tokens)
        if worst < 0 or (vocab_size is not None and worst >= vocab_size):
            return f"{name}: expected token ids from 0 to {(vocab_size or 2**63) - 1}, got {worst}"
    if len(sample["prompt"]) > length:
        return f"prompt: expected at most {length} tokens, so that one follows, got {len(sample['prompt'])}"
    number = len(sample["tokens"])
    for name in (("steps",) if steps else ()) + (("student_validity", "teacher_validity") if scores else ()):
        values = sample.get(name)
        kinds = (int,) if name == "steps" else (int, float)
        if not isinstance(values, list) or len(values) != number or any(type(v) not in kinds for v in values):
            got = f"{len(values)}: {_short(values)}" if isinstance(values, list) else _short(values)
            wanted = "integers" if name == "steps" else "numbers"
            return f"{name}: expected {number} {wanted}, one for each of the tokens, got {got}"
        low, high = (-1, 2**31 - 1) if name == "steps" else (0, 1)
        for value in values:
            if not low <= value <= high:
                return f"{name}: expected values from {low} to {high}, got {value}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
