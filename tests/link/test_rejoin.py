"""A teacher that dies at any moment: nothing is lost, and what the student receives stays what it was, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from link_jobs import Jobs, Layout
from ports import free_port
from rejoin_jobs import run_student, run_teacher, settings_for, tokens_of

from vcrd.link import LinkSettings, StudentLink, TeacherLink, host_rendezvous
from vcrd.link.transport import fake


def start_teacher(
    jobs: Jobs, name: str, layout: Layout, settings: LinkSettings, replica: int = 0, *more
) -> list[str]:
    """The names of its ranks."""
    jobs.world(name, layout.teachers, run_teacher, replica, layout, settings, *more)
    return [f"{name}{rank}" for rank in range(layout.teachers)]


def kill_all(jobs: Jobs, names: list[str]) -> None:
    """As a launcher ends what is left of a job."""
    for name in names:
        jobs.kill(name)


def finish(jobs: Jobs, names: list[str], seconds: float = 120) -> None:
    """They end by themselves, well, and leave nothing running."""
    deadline = time.monotonic() + seconds
    for name in names:
        jobs.processes[name].join(max(0.0, deadline - time.monotonic()))
        assert jobs.processes[name].exitcode == 0, f"{name}: {jobs.output(name)}"
        if name.startswith("student"):
            assert "threads left: []" in jobs.output(name)


def step_of(jobs: Jobs, name: str) -> int:
    """How many steps a student has taken."""
    return jobs.output(name).count("step ")


def await_step(jobs: Jobs, name: str, step: int) -> None:
    jobs.await_output(name, f"step {step}\n")


@pytest.mark.usefixtures("each_transport_at_leisure")
@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    """Of one rank, then of the whole job; also before it has joined. What comes back may be laid out otherwise."""
    layout = Layout(student_tensor=2, teacher_tensor=2, pipeline=1, vocab=51, student_padded=52)
    settings = settings_for(free_port(), credits=2)
    dice = random.Random(20261123)
    students = ["student0", "student1"]
    with Jobs(tmp_path) as jobs:
        # 20 seconds of steps, longer than all kills together: the last teacher finds a student to serve.
        jobs.world("student", layout.students, run_student, layout, settings, 200, 0.1)
        for kill in range(7):
            sizes = dict(teacher_tensor=dice.choice([1, 2, 3]), pipeline=dice.choice([0, 1]))
            teacher = Layout(student_tensor=2, vocab=51, **sizes)
            names = start_teacher(jobs, f"teacher{kill}.", teacher, settings)
            if kill == 6:
                break
            time.sleep(dice.uniform(0.0, 1.5))
            jobs.kill(dice.choice(names))
            time.sleep(dice.choice([0.0, 0.2]))
            kill_all(jobs, names)
        finish(jobs, [*students, *names])


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("victim", [0, 1, 2, 3], ids=["first rank", "middle stage", "sender", "other sender"])
def test_any_single_rank_may_die(victim, tmp_path):
    """The others of its replica end by themselves, with a sentence; a new replica goes on where it was."""
    layout = Layout(student_tensor=2, teacher_tensor=2, pipeline=2)
    settings = settings_for(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.world("student", layout.students, run_student, layout, settings, 40, 0.02)
        names = start_teacher(jobs, "teacher", layout, settings)
        await_step(jobs, "student1", 10)
        jobs.kill(names.pop(victim))
        for name in names:
            jobs.processes[name].join(60)
            assert jobs.processes[name].exitcode == 1, jobs.output(name)
            assert "LinkError: a rank of this teacher replica is lost" in jobs.output(name).splitlines()[-1]
        assert "teacher replica 0 is lost to student data rank 0, tensor rank 0: " in jobs.output("student0")
        finish(jobs, ["student0", "student1", *start_teacher(jobs, "second", layout, settings)])


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_the_other_replicas_go_on(tmp_path):
    layout = Layout(student_data=2, teacher_tensor=2, replicas=2)
    settings = settings_for(free_port())
    with Jobs(tmp_path) as jobs:
        # The data ranks of this test do not wait for each other, so that who is held up can be seen.
        jobs.world("student", layout.students, run_student, layout, settings, 30, 0.02, False)
        first, second = (start_teacher(jobs, f"teacher{r}.", layout, settings, r) for r in range(2))
        await_step(jobs, "student0", 5)
        kill_all(jobs, first)
        await_step(jobs, "student1", 29)
        jobs.await_output("student0", "waiting up to 90 s for teacher replica 0, lost because ")
        assert step_of(jobs, "student0") < 30 and "lost" not in jobs.output("student1")
        again = start_teacher(jobs, "again", layout, settings, 0)
        finish(jobs, ["student0", "student1", *second, *again])


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_a_stopped_teacher_is_lost_and_does_no_harm_when_it_goes_on(tmp_path):
    """It counts as lost after `timeout`, another one takes over; awake it stands by, to serve when that one dies."""
    layout = Layout(student_tensor=2, teacher_tensor=2, pipeline=1)
    settings = settings_for(free_port(), timeout=3.0)
    with Jobs(tmp_path) as jobs:
        jobs.world("student", layout.students, run_student, layout, settings, 60, 0.05)
        stopped = start_teacher(jobs, "stopped", layout, settings)
        await_step(jobs, "student0", 5)
        for name in stopped:
            jobs.signal(name, signal.SIGSTOP)
        jobs.await_output("student0", "within 3 seconds\n")
        reached = step_of(jobs, "student0")
        second = start_teacher(jobs, "second", layout, settings)
        await_step(jobs, "student0", reached + 5)
        for name in stopped:
            jobs.signal(name, signal.SIGCONT)
        jobs.await_output("stopped0", "closed its connection; waiting up to 90 seconds for it to come back")
        reached = step_of(jobs, "student0")
        await_step(jobs, "student0", reached + 5)
        assert jobs.output("student0").count("is lost to") == 1  # what it sent late changed nothing
        kill_all(jobs, second)
        finish(jobs, ["student0", "student1", *stopped])
        assert jobs.output("student0").count("is lost to") == 2


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_a_teacher_that_stops_while_it_joins_keeps_no_other_out(tmp_path):
    layout = Layout()
    settings = settings_for(free_port(), timeout=2.0)
    with Jobs(tmp_path) as jobs:
        jobs.world("student", 1, run_student, layout, settings, 5)
        jobs.start("stopped", stop_while_joining, settings)
        jobs.await_output("stopped", "stops")
        second = start_teacher(jobs, "second", layout, settings)
        finish(jobs, ["student0", *second])
        assert "did not finish joining within 2 seconds" in jobs.output("student0")


@pytest.mark.parametrize("when", ["before it makes its end", "before the probe"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_teacher_that_goes_while_a_communicator_is_made_keeps_no_other_out(how, when, tmp_path):
    layout = Layout(student_tensor=2)
    settings = settings_for(free_port(), timeout=2.0, transport="fake")
    with Jobs(tmp_path) as jobs:
        jobs.world("student", 2, run_student, layout, settings, 5)
        jobs.start("first", go_while_a_communicator_is_made, settings, how, when)
        jobs.await_output("first", "goes")
        second = start_teacher(jobs, "second", layout, settings)
        finish(jobs, ["student0", "student1", *second])
        assert "teacher replica 0 is lost to student data rank 0, tensor rank 0: " in jobs.output("student0")


def go_while_a_communicator_is_made(settings: LinkSettings, how: signal.Signals, when: str) -> None:
    def go(*_):
        print("goes", flush=True)
        os.kill(os.getpid(), how)

    if when == "before the probe":
        fake.FakeCommunicator.send = go
    else:
        fake.FakeLibrary.communicator = go
    TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)


def stop_while_joining(settings: LinkSettings) -> None:
    from vcrd.link import teacher_session

    def stop(*_):
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

    teacher_session._dial_students = stop
    TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)


@pytest.mark.usefixtures("each_transport_at_leisure")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_student_that_comes_back_finds_the_same_teacher(how, tmp_path):
    layout = Layout(student_tensor=2, student_data=2, teacher_tensor=2, pipeline=1)
    settings = settings_for(free_port())
    with Jobs(tmp_path) as jobs:
        teacher = start_teacher(jobs, "teacher", layout, settings)
        for life in range(3):
            names = [f"student{life}.{rank}" for rank in range(layout.students)]
            jobs.world(f"student{life}.", layout.students, run_student, layout, settings, 20, 0.02)
            if life == 2:
                break
            await_step(jobs, names[0], 3)
            for name in names:
                jobs.signal(name, how)
            for name in names:
                jobs.processes[name].join(30)
        finish(jobs, [*names, *teacher])
        assert "waiting up to 90 seconds for it to come back" in jobs.output("teacher0")


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_a_stopped_student_goes_on_with_the_same_teacher(tmp_path):
    """It takes nothing for longer than the teacher waits, in the middle of an answer that no buffer holds."""
    layout = Layout(vocab=400_000)  # an answer of 51 MB
    settings = settings_for(free_port(), timeout=1.0)
    with Jobs(tmp_path) as jobs:
        patient = LinkSettings(**(vars(settings) | {"timeout": 60}))
        jobs.world("student", 1, run_student, layout, patient, 6, 0.0, True, None, 2)
        teacher = start_teacher(jobs, "teacher", layout, settings)
        jobs.await_output("teacher0", "did not take what was sent within 1 seconds")
        jobs.signal("student0", signal.SIGCONT)
        finish(jobs, ["student0", *teacher])


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_no_teacher_that_comes_back_in_time_is_one_sentence_on_every_rank(tmp_path):
    layout = Layout(student_tensor=3, teacher_tensor=2, patience=2.0)
    settings = settings_for(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.world("student", layout.students, run_student, layout, settings, 1000, 0.01)
        teacher = start_teacher(jobs, "teacher", layout, settings)
        await_step(jobs, "student2", 3)
        kill_all(jobs, teacher)
        for rank in range(3):
            jobs.processes[f"student{rank}"].join(60)
            last = jobs.output(f"student{rank}").strip().splitlines()[-1]
            assert last.startswith("vcrd.link.errors.TeacherLost: teacher replica 0 is lost ("), last
            assert " of teacher replica 0 closed its connection), and none came back within 2 seconds" in last
        assert "waiting up to 2 s for teacher replica 0, lost because" in jobs.output("student0")


# Twenty deaths, each in the middle of a response.

LARGE = Layout(vocab=80_000)  # a response of 10 MB, of which the sockets hold a part


def count_what_is_held(settings: LinkSettings, deaths: int) -> None:
    """A student that says what it holds after each death of its teacher."""
    rendezvous = host_rendezvous(settings)
    link = StudentLink.connect(settings, **LARGE.student(0))
    sums = []
    for number in range(deaths + 1):
        while link._connections.requested < number + 2:
            link.request(tokens_of(0, link._connections.requested, LARGE.vocab))
        logits = link.receive(number).logits
        sums.append(float(logits.sum()))
        del logits
        held = len(os.listdir("/proc/self/fd")), threading.active_count(), resident()
        print("held", *held, flush=True)
    link.close()
    rendezvous.close()
    print(f"finished, epoch {link._connections._sent_epoch}", flush=True)


def resident() -> int:
    """This process's memory, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.usefixtures("each_transport_at_leisure")
@pytest.mark.slow
def test_twenty_deaths_leave_nothing_behind(tmp_path):
    settings = settings_for(free_port(), sockets=2)
    with Jobs(tmp_path) as jobs:
        jobs.start("holder", count_what_is_held, settings, 20)
        for death in range(20):  # each answers once, and dies sending its second answer
            name = f"teacher{death}"
            jobs.start(name, run_teacher, 0, 0, LARGE, settings, 1)
            jobs.processes[name].join(60)
            assert jobs.processes[name].exitcode == -signal.SIGKILL, jobs.output(name)
        jobs.start("last", run_teacher, 0, 0, LARGE, settings)
        finish(jobs, ["holder", "last"])
        output = jobs.output("holder")
        assert "finished, epoch 21" in output
        held = [tuple(map(int, line.split()[1:])) for line in output.splitlines() if line.startswith("held")]
        (files, threads, memory), (later_files, later_threads, later_memory) = held[5], held[-1]
        assert (later_files, later_threads) == (files, threads), held
        assert later_memory < memory + 30, str(held)  # three responses; one kept per death would be 150 MB
