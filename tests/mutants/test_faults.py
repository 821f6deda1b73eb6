"""Each mutant fits the sources, and its tests exist. `make mutants` runs them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from faults import AREAS, Fault, all_faults
from test_emulated import FIRST

ROOT = Path(__file__).resolve().parents[2]
FAULTS = all_faults()


def test_the_number_of_mutants_is_right_and_their_names_are_unique():
    assert Counter(fault.area for fault in FAULTS) == AREAS
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_mutant_fits_its_file_and_its_tests_exist(fault: Fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} must have this text once: {fault.old}"
    assert fault.new != fault.old
    files = [argument.partition("::")[0] for argument in fault.tests if ".py" in argument]
    assert files and all((ROOT / file).is_file() for file in files), files
    # These run on emulated kernels, which the fast tier does with these files.
    assert not fault.emulated or {Path(file).name for file in files} <= set(FIRST)
