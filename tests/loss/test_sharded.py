"""The vocabulary over several ranks of a gloo group, against the float64 reference on the whole of it."""

from __future__ import annotations

import pytest
import sharded_jobs as jobs


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients_match_the_reference(device, size, tmp_path):
    jobs.spawn(jobs.everything, size, tmp_path, device)


def test_one_all_gather_forward_and_no_collective_backward(device, tmp_path):
    jobs.spawn(jobs.count_collectives, 2, tmp_path, device)


def test_what_one_rank_gets_wrong_is_one_sentence_on_every_rank(device, tmp_path):
    jobs.spawn(jobs.raises_everywhere, 2, tmp_path, device)


def test_misaligned_teacher_shards_are_refused(device, tmp_path):
    jobs.spawn(jobs.misaligned_padding, 2, tmp_path, device)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_mean_normalisation_over_ranks(device, size, tmp_path):
    jobs.spawn(jobs.mean_over_ranks, size, tmp_path, device)


def test_two_groups_in_one_world(device, tmp_path):
    jobs.spawn(jobs.independent_groups, 4, tmp_path, device)


@pytest.mark.slow
def test_compiled_equals_eager(device, tmp_path):
    jobs.spawn(jobs.compiled, 2, tmp_path, device)
