"""A teacher that dies at any moment: nothing is lost, and what the student receives stays what it was, bit for bit."""

from __future__ import annotations

import hashlib
import random
import threading
import time

import torch
import torch.distributed as dist
from link_jobs import Jobs, Layout, true_logits
from ports import free_port

from vcrd.link import LinkSettings, StudentLink, TeacherLink, host_rendezvous


def settings_for(port: int, **changes) -> LinkSettings:
    return LinkSettings(
        **(dict(address=f"127.0.0.1:{port}", timeout=60, connect_timeout=60, rejoin_timeout=60) | changes)
    )


def tokens_of(data_rank: int, number: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * data_rank + number)
    return torch.randint(vocab, (2, 16), generator=generator)


def run_student(rank: int, layout: Layout, settings: LinkSettings, steps: int, pause: float) -> None:
    rendezvous = host_rendezvous(settings) if rank == 0 else None
    place = layout.student(rank)
    link = StudentLink.connect(settings, **place)
    seen = hashlib.sha256()
    for number in range(steps):
        while link._place.asks and link._asked < min(steps, number + settings.credits + 1):
            link.request(tokens_of(place["data_rank"], link._asked, layout.vocab))
        logits = link.receive(number)
        truth = true_logits(tokens_of(place["data_rank"], number, layout.vocab), layout.vocab)
        assert torch.equal(logits, truth[..., link.columns.start : link.columns.stop]), number
        seen.update(logits.numpy().tobytes())
        if rank == 0 and number % 10 == 0:
            print(f"step {number}", flush=True)
        time.sleep(pause)
        dist.barrier()  # as the loss's collectives keep the ranks in step
    link.close()
    dist.barrier()
    if rendezvous:
        rendezvous.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("vcrd")]
    print(f"finished {seen.hexdigest()}, threads left: {left}", flush=True)


def run_teacher(rank: int, replica: int, layout: Layout, settings: LinkSettings) -> None:
    last = range(layout.pipeline, layout.teachers)
    tensor_group = dist.new_group(list(last))
    link = TeacherLink.connect(
        settings, **layout.teacher(replica, rank), group=dist.group.WORLD, tensor_group=tensor_group
    )
    print("serves", flush=True)
    while (batch := link.next_batch(limit=2)) is not None:
        for request in batch:
            if rank in last:
                logits = torch.zeros(16, 2, layout.teacher_padded)
                logits[..., : layout.vocab] = true_logits(request.tokens, layout.vocab)
                link.respond(request, logits.chunk(layout.teacher_tensor, -1)[rank - layout.pipeline])
    link.close()
    print("served", flush=True)


def test_kills_at_random_moments_change_nothing(tmp_path):
    layout = Layout(student_tensor=2, teacher_tensor=2, pipeline=1, vocab=51, student_padded=52)
    settings = settings_for(free_port(), payload="float32", credits=2)
    dice = random.Random(20261123)
    with Jobs(tmp_path) as jobs:
        jobs.world("student", layout.students, run_student, layout, settings, 200, 0.01)
        kills = 0
        while jobs.processes["student0"].is_alive():
            name = f"teacher{kills}."
            jobs.world(name, layout.teachers, run_teacher, 0, layout, settings)
            time.sleep(dice.uniform(0.0, 1.2))
            if kills < 6:
                victim = dice.randrange(layout.teachers)
                jobs.kill(f"{name}{victim}")
                time.sleep(dice.choice([0.0, 0.2]))
                for rank in range(layout.teachers):  # as a launcher ends what is left of a job
                    jobs.kill(f"{name}{rank}")
                kills += 1
            else:
                jobs.processes["student0"].join(60)
        jobs.processes["student1"].join(10)
        for rank in range(layout.students):
            output = jobs.output(f"student{rank}")
            assert jobs.processes[f"student{rank}"].exitcode == 0, output
            assert "threads left: []" in output
        assert kills == 6
        print(jobs.output("student0"))
