"""The fast tests check the verifiers and the loss; `make test-all` runs the rest. Tests of a GPU need one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FAST = (
    "test_the_verifier_knows_every_correct_continuation_and_no_other",
    "test_methods_of_vcrd_equal_the_loss_of_the_package",
    "test_a_step_after_a_wrong_one_is_judged_by_what_is_written",
    "test_the_gap_is_a_weighting_of_the_package",
    "test_controls_have_what_they_should_of_the_weights",
)
collect_ignore = [] if torch.cuda.is_available() else ["test_device.py"]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.originalname not in FAST:
            item.add_marker(pytest.mark.slow)
