"""Reads the answers to micro-batches from a folder ahead of the training, in a thread of each rank."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vcrd.errors import expected
from vcrd.link.buffers import HostMemory, Upload
from vcrd.link.errors import LinkError
from vcrd.link.handshake import Handshake
from vcrd.link.plan import Place
from vcrd.link.question import Question
from vcrd.link.student import StudentLink
from vcrd.link.tracing import span

from .channel import Channel
from .files import OUTPUT_LAYER, Cache, key_of
from .sequences import Part, held_by, parts_of, question_about

_log = logging.getLogger("vcrd")
_APART = 1.0  # seconds between two looks for new files, where the teacher job answers what is not there
_PAUSE = 0.2  # seconds between two looks for a file that another rank sees already
_SHOWN = 8  # tokens of the example in a message


class AnswersMissing(LinkError):
    """The folder lacks answers, and there is no teacher job to ask."""


class Plan(NamedTuple):
    """Where the answer to a micro-batch comes from; the request leader makes it, and all its ranks follow it.

    edges: of packed sequences, empty if nothing is packed. keys: of its sequences, in order. lacking: the indices of
    those that the folder does not have, and that this run has not added yet. live: the number of the request to the
    teacher job, which then answers the whole micro-batch; None where everything is read. refusal: why the micro-batch
    has no answer; "" if it has. files: those that the request leader has opened since its last plan. The other ranks
    open the same ones in the same order. A folder may have two answers to a sequence, which differ in rounding, and so
    all ranks read the same one.
    """

    number: int
    batch: int
    sequence: int
    edges: list[int]
    keys: list[bytes]
    lacking: list[int]
    live: int | None = None
    refusal: str = ""
    files: tuple[str, ...] = ()

    @property
    def parts(self) -> list[Part]:
        return parts_of(self.batch, self.sequence, self.edges)

    def plain(self) -> dict[str, Any]:
        """The form for JSON."""
        return self._asdict() | {"keys": [key.hex() for key in self.keys]}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Plan:
        keys = [bytes.fromhex(key) for key in values["keys"]]
        return cls(**values | {"keys": keys, "files": tuple(values["files"])})


class Planner:
    """On the request leader: finds out which answers the folder has, and asks the teacher job for the others."""

    def __init__(self, cache: Cache, link: StudentLink | None) -> None:
        self._cache = cache
        self._link = link
        self._has_head = cache.header.head is None
        self._told = len(cache.files)  # files of which the other ranks know
        self._looked = time.monotonic()
        self._recorded: set[bytes] = set()  # what this run adds to the folder

    def plan(self, number: int, question: Question) -> Plan:
        batch, sequence = question.tokens.shape
        edges = question.edges.tolist()
        asked = [
            question_about(part, question.tokens, question.context)
            for part in parts_of(batch, sequence, edges)
        ]
        keys = [key_of(*each) for each in asked]
        lacking = self._lacking(keys)
        files = tuple(file.path.name for file in self._cache.files[self._told :])
        self._told += len(files)
        plan = Plan(number, batch, sequence, edges, keys, lacking, files=files)
        self._has_head = self._has_head or OUTPUT_LAYER in self._cache
        if not lacking and self._has_head:
            return plan
        if self._link is None:
            return plan._replace(refusal=self._refusal(plan, [tokens for tokens, _ in asked]))
        new = []
        for index in lacking:
            if keys[index] not in self._recorded:
                self._recorded.add(keys[index])
                new.append(index)
        live = self._link.request(question.tokens, question.edges, question.context)
        return plan._replace(lacking=new, live=live)

    def _lacking(self, keys: list[bytes]) -> list[int]:
        lacking = [index for index, key in enumerate(keys) if key not in self._cache]
        now = time.monotonic()
        if not lacking or (self._link is not None and now < self._looked + _APART):
            return lacking
        self._looked = now
        self._cache.refresh()
        return [index for index in lacking if keys[index] not in self._cache]

    def _refusal(self, plan: Plan, tokens: list[Tensor]) -> str:
        index = plan.lacking[0]
        first = " ".join(str(token) for token in tokens[index][:_SHOWN].tolist())
        more = " .." if len(tokens[index]) > _SHOWN else ""
        return str(
            expected(
                f"cache {self._cache.folder}",
                f"an answer to each sequence of micro-batch {plan.number}",
                f"none to {len(plan.lacking)} of {len(plan.keys)}, for example to the {len(tokens[index])} tokens "
                f"{first}{more} (key {plan.keys[index].hex()[:16]}); `python -m vcrd cache` adds answers, and with an "
                "address beside the cache the teacher job there is asked",
            )
        )


class Reading:
    """The thread of one rank that reads answers ahead, as many micro-batches as the credits allow.

    On the request leader `ask` gives it the micro-batches, on the other ranks `hear` does. `take` hands an answer out.
    seconds: how long it has read so far. bytes: how much.
    """

    def __init__(
        self,
        cache: Cache,
        place: Place,
        handshake: Handshake,
        memory: HostMemory,
        planner: Planner | None,
        patience: float,
    ) -> None:
        self.failure: LinkError | None = None
        self.bytes = 0
        self._seconds = 0.0
        self._since: float | None = None  # when the read in progress began
        self._cache = cache
        self._payload = cache.header.content()
        self._place = place
        self._handshake = handshake
        self._columns = handshake.shards()[place.tensor]
        self._memory = memory
        self._planner = planner
        self.head: Tensor | None = None  # with "hidden": this rank's rows of the output layer, on the host
        self._patience = patience  # seconds to wait for a file that the request leader sees already
        self._changed = threading.Condition()
        self._questions: deque[tuple[int, Question]] = deque()
        self._plans: deque[Plan] = deque()
        self._ready: dict[int, tuple[Plan, Upload | None]] = {}
        self._heard = 0  # plans that the request leader has sent
        self._no_more = False  # whether it will send no others
        self._taken = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="vcrd-cache-reader", daemon=True)

    def begin(self, channel: Channel) -> None:
        self._channel = channel
        self._thread.start()

    @property
    def seconds(self) -> float:
        since = self._since
        return self._seconds + (0.0 if since is None else time.perf_counter() - since)

    def ask(self, number: int, question: Question) -> None:
        """The next micro-batch, whose tensors nobody changes any more."""
        with self._changed:
            self._questions.append((number, question))
            self._changed.notify_all()

    def hear(self, message: dict[str, Any]) -> None:
        """A plan of the request leader."""
        try:
            plan = Plan.of(message)
        except (TypeError, ValueError, LookupError):
            self._channel.give_up(f"{self._place} cannot read what the request leader says")
            return
        with self._changed:
            self._plans.append(plan)
            self._heard = plan.number + 1
            self._changed.notify_all()

    def expect_no_more(self) -> None:
        """The request leader has ended: there will be no other plans."""
        with self._changed:
            self._no_more = True
            self._changed.notify_all()

    def fail(self, error: LinkError) -> None:
        """Notes why this rank cannot go on. The first error stays."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def is_ready(self, number: int) -> bool:
        with self._changed:
            return number in self._ready

    def take(self, number: int, seconds: float) -> tuple[Plan, Upload | None]:
        """The answer to a micro-batch; None in place of its tensors where the teacher job is asked.

        Blocks until it is read. AnswersMissing where there is none, LinkError where the ranks cannot go on or nothing
        happens for that many seconds.
        """
        with self._changed:
            ready = self._changed.wait_for(
                lambda: number in self._ready or self.failure or self._is_too_late(number), seconds
            )
            if number not in self._ready and self._is_too_late(number):
                leader = Place(self._place.data, 0, 0)
                self.failure = self.failure or LinkError(
                    f"{leader} has ended, so there is no answer to micro-batch {number}"
                )
            if not ready:
                raise LinkError(
                    f"the answer to micro-batch {number} was not read within {seconds:g} seconds (timeout)"
                )
            if number not in self._ready:
                raise self.failure
            plan, upload = self._ready[number]
            if plan.refusal:
                raise AnswersMissing(plan.refusal)
            del self._ready[number]
            self._taken = number + 1
            self._changed.notify_all()
            return plan, upload

    def _is_too_late(self, number: int) -> bool:
        return self._no_more and number >= self._heard

    def stop(self) -> None:
        """Makes the thread end; does not wait for it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # the waiting thread must get every error
            if self._stopped:
                return
            if not isinstance(error, (LinkError, ValueError, OSError)):
                _log.exception("the reader of a cache failed")
            self._channel.give_up(f"{self._place} cannot read the cache: {error}")

    def _step(self) -> bool:
        """Plans a micro-batch or reads one. False when the thread shall end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._questions or self._may_read())
            if self._stopped:
                return False
            asked = self._questions.popleft() if self._questions else None
            plan = None if asked else self._plans.popleft()
        if asked:
            plan = self._planner.plan(*asked)
            self._channel.tell(plan.plain())
            with self._changed:
                self._plans.append(plan)
            return True
        open_files(self._cache, plan.files, self._patience, lambda: self._stopped)
        with span("read", plan.number):
            upload = None if plan.refusal or plan.live is not None else self._read(plan)
        with self._changed:
            self._ready[plan.number] = plan, upload
            self._changed.notify_all()
        return True

    def _may_read(self) -> bool:
        return bool(self._plans) and self._plans[0].number < self._taken + self._handshake.credits

    def _read(self, plan: Plan) -> Upload:
        self._since = time.perf_counter()
        local = plan.sequence // self._handshake.context_size
        tensors = self._payload.blank(local, plan.batch, self._columns.width, self._memory.empty)
        if any(tensor.numel() for tensor in tensors):
            for key, part in zip(plan.keys, plan.parts, strict=True):
                held = held_by(part, self._place.context, self._handshake.context_size)
                out = [tensor[held.here, part.row] for tensor in tensors]
                self._cache.read(key, held.rows, self._columns, out)
        if self._cache.header.head is not None and self.head is None:  # the leader has seen all of it
            self.head = self._cache.head(self._columns)
        upload = Upload(tensors, self._memory)
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._seconds += time.perf_counter() - self._since
        self._since = None
        return upload


def open_files(cache: Cache, names: Sequence[str], seconds: float, stopped: Callable[[], bool]) -> None:
    """Opens files that the request leader has opened. A rank on another machine may see them later.

    LinkError where they are not there within that many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            cache.refresh(names)
            return
        except FileNotFoundError as error:
            if time.monotonic() > deadline or stopped():
                raise LinkError(
                    f"{error.filename}, which the request leader reads, is not here after {seconds:g} seconds"
                ) from None
        time.sleep(_PAUSE)
