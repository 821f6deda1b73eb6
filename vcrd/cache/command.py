"""The command `python -m vcrd cache`: its options and its output. Importing it does not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from vcrd.errors import OptionError, expected

SUMMARY = "looks at a teacher on disk: what a cache of answers holds, and whether it is whole"
DESCRIPTION = """\
A cache is a folder with the answers of a teacher. A student trains from it with VCRD_TEACHER=cache:/path, and needs no
teacher job then.

  python -m vcrd cache --info /path       which teacher has answered, and how much is there
  python -m vcrd cache --verify /path     reads every file back and compares the digests

Exit status: 0; 1 if a file is damaged or the folder is no cache; 2 for a wrong option.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--info", metavar="PATH", type=Path, help="print the header and the sizes of a cache")
    what.add_argument("--verify", metavar="PATH", type=Path, help="read a cache back and compare the digests")


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The text to print, and the exit status. OptionError without an option that says what to do."""
    for option, act in (("verify", _verify), ("info", _info)):
        folder = getattr(arguments, option)
        if folder is not None:
            from vcrd.cache.header import CacheError

            try:
                return act(folder)
            except CacheError as error:
                return str(error), 1
    raise expected("options", "--info or --verify", "none", OptionError)


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
