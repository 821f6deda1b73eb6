"""A cache that a Megatron teacher fills in its own ranks holds what the link would have delivered, bit for bit."""

from __future__ import annotations

import jobs
import torch
from ports import free_port
from worlds import World, run_worlds

from vcrd.cache.files import Cache, key_of
from vcrd.link.plan import Span
from vcrd.settings import PAYLOADS, DistillSettings


def settings(payload: str, port: int = 0, **changes) -> DistillSettings:
    own = DistillSettings(vocab_size=jobs.TRUE_VOCAB, sequence_length=jobs.SEQUENCE)
    address = f"127.0.0.1:{port or free_port()}"
    return own.replaced(payload=payload, top_k=5, address=address, connect_timeout=100, **changes)


def micro_batches(data_rank: int) -> list[dict[str, torch.Tensor]]:
    """Two whole micro-batches, and a packed one."""
    packed = {"tokens": jobs.batches(3, data_rank)[2]["tokens"][:1], "cu_seqlens": torch.tensor([0, 5, 8])}
    return [*jobs.batches(2, data_rank), packed]


def ask(ports: dict[str, int]) -> dict[str, dict[bytes, list[torch.Tensor]]]:
    """What a student of one rank receives of each sequence, by payload and key."""
    from vcrd.cache.fill import tensors_of
    from vcrd.cache.sequences import parts_of
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
            sequence_length=jobs.SEQUENCE,
            tensor_rank=0,
            tensor_size=1,
            data_rank=0,
            data_size=1,
        )
        for data_rank in range(2):
            for batch in micro_batches(data_rank):
                question = question_of(batch, "tokens")
                answer = tensors_of(link.receive(link.request(question.tokens, question.edges)))
                for part in parts_of(*question.tokens.shape, question.edges.tolist()):
                    key = key_of(question.tokens[part.row, part.start : part.stop])
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
        assert set(cache.keys()) == set(own) and len(own) == 14
        assert cache.header.weights and cache.header.checkpoint == "here"
        for key, tensors in own.items():
            out = [torch.empty_like(tensor) for tensor in tensors]
            cache.read(key, [Span(0, len(tensors[0]))], Span(0, jobs.TRUE_VOCAB), out)
            for got, expected in zip(out, tensors, strict=True):
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        if head is not None:
            assert torch.equal(cache.head(Span(0, jobs.TRUE_VOCAB)), head)
    first, again = filled[0][0::2], filled[0][1::2]
    assert [each.written for each in first] == [7] * 5 and [each.found for each in first] == [0] * 5
    assert [each.written for each in again] == [0] * 5 and [each.found for each in again] == [7] * 5
