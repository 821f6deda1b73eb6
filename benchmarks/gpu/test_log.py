"""A pytest plugin that writes a line of JSON to the file VCRD_TEST_LOG when a test starts and when it ends.

The process that runs the test appends each line at once. So the file shows which tests were running if the run is
killed. With pytest-xdist the workers do this; the controller only adds that a worker has died.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

LONGEST = 2000  # characters of a failure that are kept


class TestLog:
    __test__ = False  # no test class, although its name begins with "Test"

    def __init__(self, path: str, only_crashes: bool) -> None:
        self._path, self._only_crashes = path, only_crashes

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        if not self._only_crashes:
            self._add(event="start", test=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        crashed = report.when not in ("setup", "call", "teardown")  # xdist's report of a worker that died
        if crashed or not self._only_crashes:
            why = "" if report.passed else report.longreprtext.strip()[-LONGEST:]
            outcome = "timed out" if "from pytest-timeout" in why else report.outcome
            self._add(
                event=report.when, test=report.nodeid, outcome=outcome, seconds=report.duration, why=why
            )

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        if not self._only_crashes:
            self._add(event="end", test=nodeid)

    def _add(self, **entry: Any) -> None:
        line = json.dumps({**entry, "time": time.time()}) + "\n"
        # One write to a file opened for appending, so that lines of several workers do not mix.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def pytest_configure(config: Any) -> None:
    path = os.environ.get("VCRD_TEST_LOG")
    if path:
        distributes = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
        config.pluginmanager.register(TestLog(path, only_crashes=distributes), "vcrd-test-log")
