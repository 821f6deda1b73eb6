"""The command `python -m vcrd cache`: its options and its output. Importing it does not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from vcrd.cache.fill_command import add_fill_options, fill
from vcrd.errors import OptionError, expected

SUMMARY = "fills a teacher on disk, says what it holds, and whether it is whole"
DESCRIPTION = """\
A cache is a folder with the answers of a teacher. A student trains from it with VCRD_TEACHER=cache:/path, and needs no
teacher job then.

  python -m vcrd cache --write /path --data samples.jsonl     asks a served teacher, and writes its answers
  python -m vcrd cache --info /path       which teacher has answered, and how much is there
  python -m vcrd cache --verify /path     reads every file back and compares the digests

The teacher of --write is found with VCRD_ADDRESS, as in a training. VCRD_VOCAB_SIZE and VCRD_SEQUENCE_LENGTH must be
set, and VCRD_PAYLOAD as in the teacher job. Under torchrun or examples/slurm/cache.sbatch each process takes its share
of the samples. What the cache has is not asked again, so that a command that was stopped can be repeated.

Exit status: 0; 1 if a file is damaged, the folder is no cache, or the teacher is lost; 2 for a wrong option or sample.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--write", metavar="PATH", type=Path, help="ask the teacher about --data and write its answers"
    )
    what.add_argument("--info", metavar="PATH", type=Path, help="print the header and the sizes of a cache")
    what.add_argument("--verify", metavar="PATH", type=Path, help="read a cache back and compare the digests")
    add_fill_options(parser)


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The text to print, and the exit status. OptionError without an option that says what to do."""
    if arguments.write is not None:
        return fill(arguments)
    for option, act in (("verify", _verify), ("info", _info)):
        folder = getattr(arguments, option)
        if folder is not None:
            from vcrd.cache.header import CacheError

            try:
                return act(folder)
            except CacheError as error:
                return str(error), 1
    raise expected("options", "--write, --info or --verify", "none", OptionError)


def _verify(folder: Path) -> tuple[str, int]:
    from vcrd.cache.verify import verify

    sizes, damaged = verify(folder)
    if not damaged:
        return f"{folder}: {sizes}; no file is damaged", 0
    files = "1 file is" if len(damaged) == 1 else f"{len(damaged):,} files are"
    return f"{folder}: {sizes} are right; {files} damaged: " + "; ".join(damaged), 1


def _info(folder: Path) -> tuple[str, int]:
    from vcrd.cache.atomic import abandoned
    from vcrd.cache.files import Cache

    cache = Cache(folder)
    header = cache.header
    rows = {
        "payload": header.payload + (f", k = {header.top_k}" if header.top_k else ""),
        "vocabulary": f"{header.vocab_size:,}",
        "teacher": header.checkpoint or "no name",
        "weights": header.weights or "not known",
        "tokenizer": str(header.tokenizer or "not known"),
    }
    if header.head is not None:
        head = header.head
        cap = "" if head.softcap is None else f", softcap {head.softcap:g}"
        rows["output layer"] = f"states of {head.size:,} {head.dtype}, scale {head.scale:g}{cap}"
    rows["holds"] = str(cache.sizes())
    if left := abandoned(folder):
        rows["left over"] = f"{len(left):,} files of writers that were killed; the next writer deletes them"
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items()), 0
