"""A cache that a Megatron teacher fills in its own ranks holds what the link would have delivered, bit for bit."""

from __future__ import annotations

import jobs
import pytest
import torch
from ports import free_port
from worlds import World, run_worlds

from vcrd.cache.files import Cache, key_of
from vcrd.link.plan import Span
from vcrd.settings import PAYLOADS, DistillSettings

LENGTH = 8  # tokens in a row; the model has more positions, for a context


def settings(payload: str, port: int = 0, **changes) -> DistillSettings:
    own = DistillSettings(vocab_size=jobs.TRUE_VOCAB, sequence_length=LENGTH)
    address = f"127.0.0.1:{port or free_port()}"
    own = own.replaced(payload=payload, top_k=5, address=address, connect_timeout=100)
    return own.replaced(teacher_context_length=jobs.SEQUENCE - LENGTH, **changes)


def micro_batches(data_rank: int) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches, one with contexts of the teacher, and a packed one."""
    first, second, third = (batch["tokens"][:, :LENGTH] for batch in jobs.batches(3, data_rank))
    context = {"tokens": second, "vcrd_teacher_context": [[1, 2, 3], []]}
    packed = {"tokens": third[:1], "cu_seqlens": torch.tensor([0, 5, 7])}
    return [{"tokens": first}, {"tokens": second}, context, packed]


def ask(ports: dict[str, int]) -> dict[str, dict[bytes, list[torch.Tensor]]]:
    """What a student of one rank receives of each sequence, by payload and key."""
    from vcrd.cache.recorder import tensors_of
    from vcrd.cache.sequences import parts_of, question_about
    from vcrd.link.rendezvous import host_rendezvous
    from vcrd.link.student import StudentLink
    from vcrd.megatron.prefetch import question_of

    received = {}
    for payload, port in ports.items():
        chosen, own = settings(payload, port), {}
        rendezvous = host_rendezvous(chosen.link)
        link = StudentLink.connect(
            chosen.link,
            vocab_size=jobs.TRUE_VOCAB,
            padded_vocab_size=jobs.TRUE_VOCAB,
            sequence_length=LENGTH,
            tensor_rank=0,
            tensor_size=1,
            data_rank=0,
            data_size=1,
        )
        for data_rank in range(2):
            for batch in micro_batches(data_rank):
                question = question_of(batch, "tokens")
                answer = tensors_of(link.receive(link.request(*question[:3])))
                for part in parts_of(*question.tokens.shape, question.edges.tolist()):
                    key = key_of(*question_about(part, question.tokens, question.context))
                    # The row without a context is the same question as without the field.
                    if key not in own:
                        own[key] = [tensor[part.start : part.stop, part.row].clone() for tensor in answer]
        if payload == "hidden":
            own["head"] = link.output_layer.clone()
        received[payload] = own
        link.close()
        rendezvous.close()
    return received


def serve(ports: dict[str, int]) -> None:
    from vcrd.megatron import serve

    for payload, port in ports.items():
        # One micro-batch in a pass, as the student asks.
        serve(jobs.model(jobs.TEACHER, seed=2), settings(payload, port), microbatches=1)


def fill(folder: str) -> list:
    from megatron.core import parallel_state

    from vcrd.megatron import fill_cache

    teacher, filled = jobs.model(jobs.TEACHER, seed=2).train(), []
    data_rank = parallel_state.get_data_parallel_rank()
    first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()
    for payload in PAYLOADS:
        for _ in range(2):
            data = iter(micro_batches(data_rank)) if first else None
            filled.append(
                fill_cache([teacher], data, f"{folder}/{payload}", settings(payload), checkpoint="here")
            )
    assert teacher.training
    return filled


def test_every_payload_is_what_the_link_delivers(tmp_path):
    ports = {payload: free_port() for payload in PAYLOADS}
    (received,), _, filled = run_worlds(
        World(ask, arguments=(ports,)),
        World(serve, 4, tensor=2, pipeline=2, arguments=(ports,)),
        World(fill, 8, tensor=2, pipeline=2, arguments=(str(tmp_path),)),
    )
    received = received[0] if isinstance(received, list) else received
    for payload in PAYLOADS:
        cache, own = Cache(tmp_path / payload), received[payload]
        head = own.pop("head", None)
        assert set(cache.keys()) == set(own) and len(own) == 16
        assert cache.header.weights and cache.header.checkpoint == "here"
        for key, tensors in own.items():
            out = [torch.empty_like(tensor) for tensor in tensors]
            cache.read(key, [Span(0, len(tensors[0]))], Span(0, jobs.TRUE_VOCAB), out)
            for got, expected in zip(out, tensors, strict=True):
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        if head is not None:
            assert torch.equal(cache.head(Span(0, jobs.TRUE_VOCAB)), head)
    first, again = filled[0][0::2], filled[0][1::2]
    assert [each.written for each in first] == [8] * 5 and [each.found for each in first] == [1] * 5
    assert [each.written for each in again] == [0] * 5 and [each.found for each in again] == [9] * 5


def fill_wrongly(folder: str) -> list[str]:
    """The error of each rank for data, a model or a folder that do not fit."""
    from megatron.core import parallel_state

    from vcrd.megatron import fill_cache

    teacher, said = jobs.model(jobs.TEACHER, seed=2), []
    first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()

    def broken():
        yield {"tokens": torch.zeros(1, LENGTH, dtype=torch.int64)}
        raise OSError("the data are gone")

    cases = (
        (settings("float16"), [{"tokens": torch.full((1, 3), 45)}]),
        (settings("float16"), [{"ids": torch.zeros(1, 3)}]),
        (settings("float16"), broken()),
        (settings("topk"), micro_batches(0)),
        (settings("float16").replaced(teacher_context_length=9), []),
    )
    for chosen, data in cases:
        with pytest.raises((ValueError, OSError)) as refused:
            fill_cache(teacher, data if first else None, folder, chosen)
        said.append(str(refused.value))
    return said


def test_what_does_not_fit_is_one_sentence_on_every_rank(tmp_path):
    (said,) = run_worlds(World(fill_wrongly, 4, tensor=2, pipeline=2, arguments=(str(tmp_path / "cache"),)))
    assert said == [said[0]] * 4
    assert said[0] == [
        "tokens: expected integers in [0, 45), got 45 to 45",
        "tokens: expected a micro-batch with 'tokens', got the keys ['ids']",
        "the data are gone",
        f"the cache {tmp_path}/cache is refused: payload: expected topk, got float16; top_k: expected 5, got 0",
        "VCRD_TEACHER_CONTEXT_LENGTH (--vcrd-teacher-context-length): expected at most 4, for the positions of the "
        "teacher's model, got 9",
    ]
