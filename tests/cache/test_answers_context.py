"""Answers to sequences of which the teacher sees more: another context is another answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from link_jobs import true_logits
from ports import free_port
from test_answers_failures import LAYOUT, SETTINGS, VOCAB, batch, opened

from vcrd.cache.files import Cache
from vcrd.link import LinkSettings, TeacherLink, host_rendezvous
from vcrd.link.question import Context

CONTEXT = Context(torch.tensor([3, 4, 5]), torch.tensor([0, 8, 8]))
OTHER = Context(torch.tensor([3, 4, 6]), torch.tensor([0, 8, 8]))  # for the second row


def teach(settings: LinkSettings) -> int:
    """Answers with the sum of the context in every logit of a micro-batch; returns how many it was asked about."""
    link, asked = TeacherLink.connect(settings, **LAYOUT.teacher(0, 0), group=None, tensor_group=None), 0
    while (requests := link.next_batch(1)) is not None:
        for request in requests:
            asked += 1
            link.respond(request, true_logits(request.tokens, VOCAB) + float(request.context.tokens.sum()))
    link.close()
    return asked


def test_an_answer_is_found_by_its_context_too(tmp_path):
    settings = replace(SETTINGS, address=f"127.0.0.1:{free_port()}", teacher=None, teacher_context_length=4)
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        teaching = pool.submit(teach, settings)
        answers = opened(tmp_path, settings)
        for number, context in enumerate([CONTEXT, OTHER, Context()]):
            answers.request(batch(0), (), context)
            answers.receive(number)
        with pytest.raises(ValueError, match="teacher_context: expected at most 4 tokens per sequence"):
            answers.request(batch(0), (), Context(torch.ones(9).long(), torch.zeros(9).long()))
        answers.close()
        assert teaching.result(30) == 3
    rendezvous.close()
    assert len(list(Cache(tmp_path).keys())) == 5, "the first row has the same context twice"
    answers = opened(tmp_path, replace(settings, address=None, teacher="cache:/x"))
    answers.request(batch(0), (), OTHER)
    got, wanted = answers.receive(0).logits, true_logits(batch(0), VOCAB)
    answers.close()
    assert torch.equal(got[:, 1], wanted[:, 1] + 13) and torch.equal(got[:, 0], wanted[:, 0] + 12)
