"""The link's own work in a torch.profiler trace, and the traces of both jobs as one file.

    with vcrd.link.trace("student.json"):  # a few steps, in either job, on any rank
        ...

    vcrd.link.merge_traces("both.json", ["student.json", "teacher.json"])

Open both.json in ui.perfetto.dev or chrome://tracing: one row of threads per process, on one clock. The ranges are
"vcrd.link WHAT N" with N the micro-batch: request, wait and receive in the student; encode and send in the teacher,
each in the thread where it happens. A torch.profiler of the caller's own shows those of its own thread.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_APART = 10**8  # between the process numbers of two files; larger than any process number


def span(what: str, number: int) -> record_function:
    """A range of the trace; without a profiler some microseconds for nothing."""
    return record_function(f"vcrd.link {what} {number}")


@contextmanager
def trace(path: str | Path, name: str | None = None) -> Iterator[None]:
    """Writes what all threads of this process do meanwhile, and its GPU, to `path` as a Chrome trace.

    name: of the process in the trace; None: the file's. Holds every event in memory, so trace a few steps at a time.
    torch before 2.7 records the calling thread only.
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
    """Writes the Chrome traces in these files as one: processes in their order, all on the first one's clock.

    Traces of two machines are as far apart as their clocks.
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
            if "id" in event:  # of arrows, from a call to what it started on a GPU
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
