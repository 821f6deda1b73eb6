"""A Megatron rank's telemetry: which GPU it has, what its first record says, how a teacher spends its time."""

from __future__ import annotations

import logging
import platform
import time
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from vcrd.link.teacher import TeacherLink
from vcrd.monitor.bottleneck import idle_sentence
from vcrd.monitor.telemetry import Telemetry
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")


def telemetry_of(
    chunk: torch.nn.Module, settings: DistillSettings, role: str, teacher: Any = None
) -> Telemetry | None:
    """This rank's, with its record "start"; None where the settings name no folder. Not a collective.

    teacher: of a student, `RemoteTeacher` or `ColocatedTeacher`, whose received bytes are recorded.
    """
    if settings.telemetry_dir is None:
        return None
    device = next((parameter.device for parameter in chunk.parameters()), torch.device("cpu"))
    uuid, name = None, platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        uuid, name = str(properties.uuid), properties.name
    found = Telemetry(settings.telemetry_dir, role, dist.get_rank(), uuid=uuid)
    found.write("start", device=name, **_facts(settings))
    if teacher is not None:
        found.follow("link_bytes", lambda: teacher.bytes_received)
    return found


def _facts(settings: DistillSettings) -> dict[str, Any]:
    """Of the run and of this rank's place in it; what the page shows as what ran."""
    names = (
        "divergence",
        "temperature",
        "sharpness",
        "floor",
        "ceiling",
        "normalization",
        "ce_weight",
    )
    link = ("payload", "transport", "credits")
    return {
        "world": dist.get_world_size(),
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "tensor_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "pipeline_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_size": parallel_state.get_context_parallel_world_size(),
        "data_rank": parallel_state.get_data_parallel_rank(),
        "data_size": parallel_state.get_data_parallel_world_size(),
        "torch": torch.__version__,
        "validity": settings.validity if isinstance(settings.validity, str) else "a function",
        "settings": {name: getattr(settings, name) for name in names}
        | {name: getattr(settings.link, name) for name in link},
    }


class Serving:
    """How a rank of a teacher replica spends its time: idle, waiting for requests, or answering them. Of the latter,
    sending are the seconds in which it waits for earlier answers to leave.

    Seconds of the host. On a GPU the host waits for the device where it waits for answers to leave, for they leave when
    they are computed: there `gpu_utilization` tells the two apart.
    """

    def __init__(self, telemetry: Telemetry | None, replica: int) -> None:
        self._telemetry = telemetry
        self._replica = replica
        self._speaks = (
            parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self._mark = time.perf_counter()
        self._idle = self._busy = self._blocked = 0.0

    def begin(self, link: TeacherLink) -> None:
        """A student job is there."""
        self._mark = time.perf_counter()
        self._idle = self._busy = self._blocked = 0.0
        if self._telemetry is not None:
            self._telemetry.enter("idle")
            self._telemetry.follow("bytes_sent", lambda: link.bytes_sent)

    def idled(self) -> None:
        """Requests have come."""
        self._idle += self._lap()
        if self._telemetry is not None:
            self._telemetry.enter("answering")

    def answered(self, requests: int, link: TeacherLink) -> None:
        """They are answered, as far as this rank is concerned."""
        self._busy += self._lap()
        if self._telemetry is not None:
            self._telemetry.enter("idle")
            self._telemetry.add(answers=requests, sending=link.blocked - self._blocked)
        self._blocked = link.blocked

    def end(self) -> None:
        """The student job has gone; before the link to it is closed."""
        if self._telemetry is not None:
            self._telemetry.enter(None)
            self._telemetry.unfollow("bytes_sent")

    def say_how_idle(self) -> None:
        """After a student job, in the log, where this replica was more idle than it should be.

        Of its stages the last has the least time without a request: it has them from the moment that they come until
        the answers have left, and the pipeline is no faster than that.
        """
        said = idle_sentence(self._replica, self._idle / max(1e-9, self._idle + self._busy))
        if said is None or not self._speaks:
            return
        _log.info("%s", said)
        if self._telemetry is not None:
            self._telemetry.write("idle", sentence=said)

    def close(self) -> None:
        if self._telemetry is not None:
            self._telemetry.close()

    def _lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before
