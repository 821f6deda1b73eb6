"""The groups and the vocabulary of a model: its own where it has them."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from vcrd.megatron.layout import Groups, Layout
from vcrd.settings import DistillSettings

KEYS = ("tp", "pp", "mp", "cp", "tp_cp", "dp", "dp_cp")


def group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def model(**config) -> SimpleNamespace:
    own = SimpleNamespace(**{key: group(0, number + 1) for number, key in enumerate(KEYS)})
    return SimpleNamespace(
        pg_collection=own,
        vocab_size=48,
        max_sequence_length=8,
        config=SimpleNamespace(**config),
        parameters=lambda: iter(()),
    )


def test_a_models_own_groups_need_no_global_state():
    found = Groups.of(model())
    assert [getattr(found, field.name).size() for field in fields(Groups)] == [1, 2, 3, 4, 5, 6, 7]
    layout = Layout.of(model(), DistillSettings())
    assert (layout.tensor_size, layout.context_size, layout.data_size) == (1, 4, 6)
    assert layout.tensor_group is None and not found.last_stage


def test_a_group_that_neither_has_is_named():
    chunk = model()
    chunk.pg_collection.tp_cp = None
    with pytest.raises(ValueError, match="model: expected a process group 'tp_cp' in its pg_collection, or"):
        Groups.of(chunk)


def test_groups_that_leave_out_data_are_not_taken():
    chunk = model()
    chunk.pg_collection.gtp_remat = group(0, 2)
    with pytest.raises(ValueError, match="got neither"):
        Groups.of(chunk)


@pytest.mark.parametrize(
    ("config", "setting", "columns"),
    [({}, None, 48), ({"vocab_size": 45}, None, 45), ({"vocab_size": 45}, 44, 44)],
)
def test_the_true_vocabulary_is_the_settings_then_the_configurations(config, setting, columns):
    assert Layout.of(model(**config), DistillSettings(vocab_size=setting)).vocab_size == columns
