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
    "test_a_token_is_valid_where_a_correct_solution_continues_with_its_text",
    "test_generation_with_a_cache_equals_the_plain_model",
    "test_a_frozen_copy_has_the_same_logits",
    "test_logits_do_not_depend_on_the_other_rows_of_a_batch",
    "test_the_losses_of_all_methods_equal_a_direct_computation",
    "test_an_interrupted_comparison_continues_as_if_it_had_not_been",
)
collect_ignore = [] if torch.cuda.is_available() else ["test_device.py"]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.originalname not in FAST:
            item.add_marker(pytest.mark.slow)
