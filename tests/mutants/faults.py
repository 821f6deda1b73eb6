"""The faults that `campaign.py` plants, one at a time, to see whether the tests notice.

Each is what a person could write by mistake in that line: a wrong rank, a bound that is off by one, a sum over the
wrong tokens. It compiles, changes what is computed, and breaks no rule of style.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNELS, LOSS, LINK = "kernels", "loss", "link and plug"
AREAS = {KERNELS: 20, LOSS: 15, LINK: 20}  # how many there are of each


@dataclass(frozen=True)
class Fault:
    """One text of one file, and what stands there instead.

    name: what is wrong with it, in words. old: occurs exactly once in `file`. tests: arguments of pytest that select
    the tests most likely to notice, few enough to be quick; files come first. emulated: only a GPU runs this code, so
    the selection is of tests/loss, run on the emulated CUDA kernels, as tests/cuda_emulation does: files, or functions
    as `file::function`. harmless: why nobody can notice it, if so.
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
    from kernel_faults import FAULTS as kernels
    from link_faults import FAULTS as link
    from loss_faults import FAULTS as loss

    return [*kernels, *loss, *link]
