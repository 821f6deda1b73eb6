"""Reads a whole cache back and compares the digests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vcrd.cache.answer_file import AnswerFile
from vcrd.cache.files import Cache, Sizes
from vcrd.cache.header import CacheError

_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading run without the lock of the interpreter


class CheckedCache(Cache):
    """The answers of a folder in files whose every byte has been compared with the digest of the file.

    damaged: for each other file a sentence that names it. CacheError if the folder has no header.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.damaged: list[str] = []
        super().__init__(folder)

    def _opened(self, names: Sequence[str]) -> list[AnswerFile]:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._checked, names))
        self.damaged += [str(each) for each in found if isinstance(each, CacheError)]
        return [each for each in found if isinstance(each, AnswerFile)]

    def _checked(self, name: str) -> AnswerFile | CacheError | None:
        try:
            file = self._open(name)
            file.verify()
        except FileNotFoundError:
            return None
        except CacheError as error:
            return error
        return file


def verify(folder: str | os.PathLike) -> tuple[Sizes, list[str]]:
    """What a cache holds in files that are right, and a sentence about each damaged one."""
    cache = CheckedCache(folder)
    return cache.sizes(), cache.damaged
