"""The work of the link in a torch.profiler trace, and the traces of both jobs in one file.

    with vcrd.link.trace("student.json"):  # a few steps, in either job, on any rank
        ...

    vcrd.link.merge_traces("both.json", ["student.json", "teacher.json"])

Open both.json in ui.perfetto.dev or chrome://tracing. It has the threads of every process on one clock. The ranges are
"vcrd.link WHAT N", where N is the micro-batch. WHAT is request, wait or receive in the student, and encode or send in
the teacher. Each range is in the thread that does the work. A torch.profiler of the caller sees the ranges of its own
thread only.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_APART = 10**8  # added to the process numbers of each further file; larger than any process number


def span(what: str, number: int) -> record_function:
    """A range of the trace. Without a profiler it costs some microseconds."""
    return record_function(f"vcrd.link {what} {number}")


@contextmanager
def trace(path: str | Path, name: str | None = None) -> Iterator[None]:
    """Records all threads of this process and its GPU, and writes them to `path` as a Chrome trace.

    Args:
        name: the name of the process in the trace; None: the name of the file.

    Every event is held in memory, so trace a few steps at a time. torch before 2.7 records the calling thread only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, experimental_config=_all_threads()) as profiler:
        yield
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    profiler.export_chrome_trace(str(path))
    content = json.loads(path.read_text())
    for event in content["traceEvents"]:
        if (
            event["ph"] == "M"
            and event["name"] == "process_name"
            and event["args"]["name"].startswith("python")
        ):
            event["args"]["name"] = name or path.stem
        if event["ph"] == "M" and event["name"] == "thread_name" and event["tid"] in names:
            event["args"]["name"] = names[event["tid"]]
    path.write_text(json.dumps(content))


def merge_traces(merged: str | Path, paths: Sequence[str | Path]) -> None:
    """Writes the Chrome traces in these files as one file: processes in order, on the clock of the first file.

    The traces of two machines differ by as much as the clocks of the machines.
    """
    contents = [json.loads(Path(path).read_text()) for path in paths]
    base = contents[0]["baseTimeNanoseconds"]
    events = []
    for place, content in enumerate(contents):
        shift = (content["baseTimeNanoseconds"] - base) / 1000
        for event in content["traceEvents"]:
            event = {**event, "pid": _apart(event.get("pid", 0), place)}
            if "ts" in event:
                event["ts"] += shift
            if "id" in event:  # the number of an arrow from a call to the kernel that it launched
                event["id"] = _apart(event["id"], place)
            if event["name"] == "process_sort_index":
                event["args"] = {"sort_index": event["args"]["sort_index"] % _APART + place * _APART}
            events.append(event)
    Path(merged).write_text(json.dumps({**contents[0], "traceEvents": events}))


def _apart(number: int | str, place: int) -> int | str:
    return number + place * _APART if isinstance(number, int) else f"{number} {place}"


def _all_threads():
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        return None
