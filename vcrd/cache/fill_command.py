"""`python -m vcrd cache --write`: its options, the group of its ranks, its progress and its last line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from vcrd.errors import OptionError, expected

if TYPE_CHECKING:
    import torch.distributed as dist

# A rank that is done waits for the others. A rank that is gone is noticed at once.
_PATIENCE = timedelta(days=30)


def add_fill_options(parser: argparse.ArgumentParser) -> None:
    """The options that belong to --write."""
    add = parser.add_argument_group("with --write").add_argument
    add(
        "--data",
        metavar="FILE",
        type=Path,
        nargs="+",
        help='samples: .jsonl with {"tokens": [..]} in each line, .npy or .safetensors with integers [n, s]',
    )
    add("--micro-batch", metavar="N", default="1", help="samples in one request (1)")
    add(
        "--file-size",
        metavar="MB",
        default="256",
        help="of each file; what is not in a file yet is lost when the process is killed (256)",
    )
    add(
        "--exit-signal-handler",
        action="store_true",
        help="at SIGTERM write what has arrived and exit with 0, as with Megatron's argument of this name",
    )


def fill(options: argparse.Namespace) -> tuple[str, int]:
    """Fills the cache. Returns the text to print and the exit status. OptionError for a wrong option or sample."""
    if not options.data:
        raise expected("--data", "files of samples", "none", OptionError)
    batch, size_mb = (_count(name, getattr(options, name)) for name in ("micro_batch", "file_size"))
    # Imported here because they import torch.
    from vcrd.link.errors import LinkError
    from vcrd.settings import DistillSettings

    from .files import CacheError
    from .fill import Filled, stop_at_sigterm
    from .fill import fill as fill_from
    from .samples import questions_of

    try:
        settings = DistillSettings.from_environment()
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from None

    if options.exit_signal_handler:
        stop_at_sigterm()

    def report(filled: Filled) -> None:
        print(filled, file=sys.stderr, flush=True)

    try:
        with _group() as group:
            rank, size = (0, 1) if group is None else (group.rank(), group.size())
            questions = (
                question
                for path in options.data
                for question in questions_of(
                    path, batch, settings.vocab_size, settings.sequence_length, rank, size
                )
            )
            filled = fill_from(
                questions,
                options.write,
                settings,
                group=group,
                file_bytes=size_mb << 20,
                report=report if rank == 0 else None,
            )
    except OptionError:
        raise
    except (LinkError, CacheError) as error:
        print(f"python -m vcrd cache: {error}", file=sys.stderr)
        return "", 1
    except ValueError as error:
        raise OptionError(str(error)) from None
    return f"{options.write}: {filled}" if rank == 0 else "", 0


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise expected(f"--{name.replace('_', '-')}", "an integer of at least 1", repr(text), OptionError)
    return int(text)


@contextmanager
def _group() -> Iterator[dist.ProcessGroup | None]:
    """All processes of torchrun or examples/slurm/rank.sh; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
