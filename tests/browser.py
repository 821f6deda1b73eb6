"""Opens a page in headless Chromium and returns its picture, errors and requests. Uses pipes, so no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
# Chromium reads commands from descriptor 3 and writes replies to descriptor 4.
_SHIM = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3]]
for place, end in zip((3, 4), ends):
    os.dup2(end, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Seen:
    """complaints: errors and warnings of the console, and exceptions. requests: URLs but for the page and data in it.
    picture: PNG of the whole page, width pixels wide. values: of the expressions.
    """

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    picture: bytes = b""
    values: list[Any] = field(default_factory=list)


class Browser:
    """with Browser() as browser: browser.look(page, 400)"""

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory()
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [sys.executable, "-c", _SHIM, str(theirs_in), str(theirs_out), chromium(), *_OPTIONS]
        command.append(f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest = 0, b""
        self._events: list[dict] = []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("Browser.close")
        except (OSError, AssertionError):
            pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile.name, ignore_errors=True)

    def look(self, page: Path, width: int, *expressions: str, dark: bool = False) -> Seen:
        """Opens the page in a window of that width. expressions: JavaScript, evaluated after loading.

        dark: for a user who prefers dark pages.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable", session)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", session, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._call("Page.navigate", session, url=page.resolve().as_uri())
        self._await("Page.loadEventFired")
        seen = Seen()
        for expression in expressions:
            answer = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True)
            assert "exceptionDetails" not in answer, answer
            seen.values.append(answer["result"].get("value"))
        picture = self._call("Page.captureScreenshot", session, captureBeyondViewport=True)
        seen.picture = base64.b64decode(picture["data"])
        for event in self._events:
            _note(event, page.resolve().as_uri(), seen)
        self._call("Target.closeTarget", targetId=target)
        return seen

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._number)
        assert "error" not in answer, answer
        return answer["result"]

    def _await(self, event: str) -> None:
        if not any(seen["method"] == event for seen in self._events):
            self._until(lambda found: found.get("method") == event)

    def _until(self, wanted: Any) -> dict:
        """The first matching message. Keeps the events before it."""
        deadline = time.monotonic() + _SECONDS
        while True:
            while b"\0" in self._rest:
                raw, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(raw)
                if "method" in message:
                    self._events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium did not answer in time"
            more = os.read(self._from, 1 << 20)
            assert more, "Chromium has ended"
            self._rest += more


def _note(event: dict, page: str, seen: Seen) -> None:
    found = event["params"]
    if event["method"] == "Runtime.exceptionThrown":
        seen.complaints.append(found["exceptionDetails"]["text"])
    elif event["method"] == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
        seen.complaints.append(found["entry"]["text"])
    elif event["method"] == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
        seen.complaints.append(str(found["args"]))
    elif event["method"] == "Network.requestWillBeSent":
        url = found["request"]["url"]
        if url != page and not url.startswith("data:"):
            seen.requests.append(url)
