"""The mutants for `campaign.py`, which checks that the tests kill each of them.

Each mutant is a mistake that a person could make in one line: a wrong rank, a bound that is off by one, a sum over the
wrong tokens. It compiles, changes the result, and breaks no rule of style.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNELS, LOSS, LINK, INTEGRATIONS = "kernels", "loss", "link and plug", "integrations"
CACHE, TEACHERS = "cache", "teachers"
# The number of mutants in each area.
AREAS = {KERNELS: 20, LOSS: 27, LINK: 20, CACHE: 26, TEACHERS: 21, INTEGRATIONS: 20}


@dataclass(frozen=True)
class Fault:
    """Replaces one text of one file by another.

    name: describes the error. old: occurs exactly once in `file`. tests: arguments of pytest for a few tests that
    should fail; files come first. emulated: only a GPU runs this code, so `tests` are of tests/loss, run on the
    emulated CUDA kernels as in tests/cuda_emulation: files, or functions as `file::function`. harmless: why no test can
    kill it, if so. The tests of the area "integrations" run where its systems are installed.
    """

    name: str
    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    emulated: bool = False
    harmless: str = ""


def all_faults() -> list[Fault]:
    from integration_faults import FAULTS as integrations
    from kernel_faults import FAULTS as kernels
    from link_faults import FAULTS as link
    from loss_faults import FAULTS as loss
    from teacher_faults import FAULTS as teachers

    return [*kernels, *loss, *link, *teachers, *integrations]
