"""What the ranks of a student add of the answers of a teacher job: together each answer, and no part of it twice."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from cache_jobs import HEADERS, VOCABULARY, random_bits, same
from torch import Tensor

from vcrd.cache.files import OUTPUT_LAYER, Cache, CacheHeader, CacheWriter, key_of
from vcrd.cache.reading import Plan
from vcrd.cache.recorder import Recorder
from vcrd.cache.sequences import parts_of
from vcrd.link.plan import Place, Shard, Span, context_rows, places, vocab_shards
from vcrd.teacher_logits import DenseLogits, HiddenStates, TeacherLogits, TopKLogits

CPU = torch.device("cpu")
LENGTH, EDGES, LACKING = 24, [0, 4, 12, 24], [1, 2]
OUTPUT_ROWS = random_bits(torch.empty(VOCABULARY, 5, dtype=torch.bfloat16), 7)


def plan_of(number: int, lacking: list[int]) -> Plan:
    keys = [key_of(torch.tensor([number, index])) for index in range(3)]
    return Plan(number, 1, LENGTH, EDGES, keys, lacking, live=number)


def whole_answer(header: CacheHeader, number: int) -> list[Tensor]:
    blank = header.content().blank(LENGTH, 1, VOCABULARY)
    return [random_bits(tensor, 100 * number + slot) for slot, tensor in enumerate(blank)]


def form_of(header: CacheHeader, tensors: list[Tensor]) -> TeacherLogits:
    if header.payload == "topk":
        return TopKLogits(*tensors)
    return HiddenStates(tensors[0], OUTPUT_ROWS) if header.payload == "hidden" else DenseLogits(tensors[0])


def link_of(header: CacheHeader, columns: Shard) -> SimpleNamespace:
    teacher = SimpleNamespace(weights=header.weights, named_weights=header.weights)
    own = OUTPUT_ROWS[columns.start : columns.stop]
    return SimpleNamespace(teacher=teacher, columns=columns, output_layer=own)


@pytest.mark.parametrize("payload", HEADERS)
def test_the_ranks_add_each_answer_once(tmp_path, payload):
    """Over tensor- and context-parallel ranks, packed sequences, and two micro-batches."""
    header = HEADERS[payload]
    is_whole = header.content().whole
    answers = [whole_answer(header, number) for number in range(2)]
    for place in [*places([0], 2, 3), Place(1, 0, 0)]:  # the other replica has not been asked anything
        columns = vocab_shards(VOCABULARY, 48, 3)[place.tensor]
        spans = context_rows(LENGTH, place.context, 2, EDGES)
        rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        writer = CacheWriter(tmp_path, header, run="one")
        recorder = Recorder(writer, link_of(header, columns), place, 2, CPU, has_head=False)
        for number, whole in enumerate(answers):
            if place.data == 0:
                own = [
                    tensor[rows] if is_whole else tensor[rows][..., columns.start : columns.stop]
                    for tensor in whole
                ]
                recorder.add(plan_of(number, LACKING), form_of(header, own))
        recorder.close()
        recorder.close()
    cache = Cache(tmp_path, header)
    wanted = {}
    for number, whole in enumerate(answers):
        for index in LACKING:
            part = parts_of(1, LENGTH, EDGES)[index]
            wanted[plan_of(number, []).keys[index]] = [t[part.start : part.stop, 0] for t in whole]
    assert set(cache.keys()) == set(wanted)
    for key, tensors in wanted.items():
        out = [torch.empty_like(tensor) for tensor in tensors]
        cache.read(key, [Span(0, len(tensors[0]))], Shard(0, VOCABULARY), out)
        assert same(out, tensors)
    stored = dict.fromkeys([*wanted, OUTPUT_LAYER], 0)
    for file in cache.files:
        for key, (start, stop, _) in zip(file.keys, file.rows.tolist(), strict=True):
            stored[key] += (stop - start) * file.columns.width
    head = stored.pop(OUTPUT_LAYER)
    assert stored == {key: len(tensors[0]) * VOCABULARY for key, tensors in wanted.items()}
    if payload == "hidden":
        assert same([cache.head(Shard(0, VOCABULARY))], [OUTPUT_ROWS]) and head == VOCABULARY * VOCABULARY


def test_the_answers_of_a_teacher_that_came_back_with_other_weights_are_not_added(tmp_path, caplog):
    """With the setting identity "warn" the link lets it in. What was added before is written, nothing afterwards."""
    header = HEADERS["float16"]
    link = link_of(header, Shard(0, VOCABULARY))
    recorder = Recorder(CacheWriter(tmp_path, header), link, Place(0, 0, 0), 1, CPU, has_head=False)
    with caplog.at_level(logging.WARNING, "vcrd"):
        for number, weights in enumerate([header.weights, "cd", header.weights]):
            link.teacher = SimpleNamespace(weights=weights, named_weights=f"{weights} (two)")
            recorder.add(plan_of(number, LACKING), form_of(header, whole_answer(header, number)))
        recorder.close()
    assert set(Cache(tmp_path).keys()) == set(plan_of(0, []).keys[1:])
    (said,) = [record.message for record in caplog.records if "adds no more answers" in record.message]
    assert said.endswith("the teacher has the weights cd (two), the cache is of ab12")


def test_the_output_layer_of_a_teacher_that_came_back_with_other_weights_is_not_added(tmp_path, caplog):
    """The first teacher is lost before its output layer has arrived, so the link delivers that of the second."""
    header = HEADERS["hidden"]

    class Link(SimpleNamespace):
        @property
        def output_layer(self) -> Tensor:
            self.teacher = SimpleNamespace(weights="cd", named_weights="cd (two)")
            return OUTPUT_ROWS + 1

    first = SimpleNamespace(weights=header.weights, named_weights=header.weights)
    link = Link(teacher=first, columns=Shard(0, VOCABULARY))
    recorder = Recorder(CacheWriter(tmp_path, header), link, Place(0, 0, 0), 1, CPU, has_head=False)
    with caplog.at_level(logging.WARNING, "vcrd"):
        recorder.add(plan_of(0, LACKING), form_of(header, whole_answer(header, 0)))
        recorder.close()
    assert not list(tmp_path.glob("answers-*"))
    (said,) = [record.message for record in caplog.records if "adds no more answers" in record.message]
    assert said.endswith("the teacher has the weights cd (two), the cache is of ab12")
