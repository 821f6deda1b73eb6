"""The top k and the hidden states of a teacher, with the vocabulary over several ranks of a gloo group."""

from __future__ import annotations

import forms_jobs as jobs
import pytest
from sharded_jobs import spawn


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_values_and_gradients_match_the_reference(device, size, tmp_path):
    spawn(jobs.everything, size, tmp_path, device)


def test_collectives_do_not_grow_with_blocks(device, tmp_path):
    spawn(jobs.count_collectives, 2, tmp_path, device)


def test_what_one_rank_gets_wrong_is_one_sentence_on_every_rank(device, tmp_path):
    spawn(jobs.raises_everywhere, 2, tmp_path, device)
