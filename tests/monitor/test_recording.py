"""The thread that reads the GPU and writes the records: its records, its end, and that it never stops a run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from vcrd.monitor.nvml import Gpu, NoGpu
from vcrd.monitor.records import RecordFile, read_records
from vcrd.monitor.telemetry import Telemetry

LONG = 60.0  # seconds, longer than any step of these tests
UUID = "5c0f0fb1-0000-0000-0000-000000000001"


class FakeNvml:
    """A fake pynvml with one GPU. Each reading is larger than the last one."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX = 138
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 139

    class NVMLError(Exception):
        def __str__(self) -> str:
            return {3: "Not Supported", 6: "Not Found"}.get(self.args[0], "Unknown Error")

    def __init__(self, uuid: str = f"GPU-{UUID}", refused: tuple[str, ...] = ()) -> None:
        self.uuid, self.refused, self.readings, self.open = uuid, refused, 0, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise self.NVMLError(6)
        return uuid

    def _tell(self, what: str) -> None:
        if what in self.refused:
            raise self.NVMLError(3)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self._tell("memory")
        self.readings += 1
        return SimpleNamespace(used=1000 * self.readings)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._tell("utilization")
        return SimpleNamespace(gpu=100 if self.readings % 2 else 50)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._tell("power")
        return 300_000 + self.readings

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list) -> list[SimpleNamespace]:
        assert [scope for _, scope in fields] == [0xFFFFFFFF] * 2
        code = 3 if "nvlink" in self.refused else 0
        return [
            SimpleNamespace(
                nvmlReturn=code, value=SimpleNamespace(ullVal=self.readings * (1 if field == 138 else 2))
            )
            for field, _ in fields
        ]


def lines(folder: Path, kind: str) -> list[dict]:
    path = folder / "student-00003.jsonl"
    return [record for record in read_records(path) if record["kind"] == kind] if path.exists() else []


def recording(folder: Path, nvml: FakeNvml | None, interval: float = 0.25) -> Telemetry:
    return Telemetry(
        folder, "student", 3, interval, UUID if nvml else None, open_gpu=lambda uuid: Gpu(uuid, nvml)
    )


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vcrd-telemetry"]


def test_records_have_the_gpu_and_the_counters(tmp_path):
    nvml = FakeNvml()
    telemetry = recording(tmp_path, nvml)
    telemetry.at(7)
    for _ in range(3):
        telemetry.add(steps=1, teacher_wait=0.5)

    def read_twice() -> bool:
        return any(0.5 < row["gpu_utilization"] < 1.0 for row in lines(tmp_path, "rank")[1:])

    wait_until(read_twice, LONG, "the GPU is read more than once in an interval")
    telemetry.write("figures", loss=1.5, weights=(1, 2), nothing=float("nan"))
    telemetry.close()
    telemetry.close()
    rows = lines(tmp_path, "rank")
    assert len(rows) >= 3 and nvml.open == 0 and not threads()  # the last one at closing
    assert (
        sum(row.get("steps", 0) for row in rows) == 3
        and sum(row.get("teacher_wait", 0) for row in rows) == 1.5
    )
    memory = [row["gpu_memory_bytes"] for row in rows]
    assert memory == sorted(memory) and memory[-1] == 1000 * nvml.readings, (
        "each is the largest of its interval"
    )
    assert all(0.5 <= row["gpu_utilization"] <= 1.0 for row in rows)
    sent = sum(row["nvlink_sent_bytes_per_second"] * row["seconds"] for row in rows)
    received = sum(row["nvlink_received_bytes_per_second"] * row["seconds"] for row in rows)
    # From the first counted reading on. The one before it only finds out what this GPU supports.
    assert sent == pytest.approx(1024 * (nvml.readings - 2)) and received == pytest.approx(2 * sent)
    assert all(row["gpu_power_watts"] > 300 and row["host_memory_bytes"] > 1e6 for row in rows)
    (figures,) = lines(tmp_path, "figures")
    assert (figures["loss"], figures["weights"], figures["nothing"]) == (1.5, [1, 2], None)
    assert (figures["iteration"], figures["role"], figures["rank"]) == (7, "student", 3)
    assert abs(figures["time"] - time.time()) < 60 and figures["host"]


def test_a_step_in_the_first_interval_has_the_memory_of_the_host(tmp_path):
    telemetry = Telemetry(tmp_path, "student", 0, LONG)
    assert telemetry.latest["host_memory_bytes"] > 1e6
    telemetry.close()
    fake = FakeNvml()
    telemetry = Telemetry(tmp_path, "student", 1, LONG, UUID, open_gpu=lambda name: Gpu(name, fake))
    wait_until(lambda: "gpu_memory_bytes" in telemetry.latest, LONG, "the first reading of the GPU")
    assert telemetry.latest["host_memory_bytes"] > 1e6
    telemetry.close()


def test_a_lasting_state_and_a_counter_are_in_every_interval(tmp_path):
    telemetry, counter = recording(tmp_path, None, interval=0.1), [0.0]
    telemetry.follow("bytes", lambda: counter[0])
    before = time.monotonic()
    telemetry.enter("idle")
    inside = time.monotonic()
    for written in range(1, 5):
        counter[0] += 100
        wait_until(
            lambda least=written: len(lines(tmp_path, "rank")) >= least, LONG, "an interval is written"
        )
    lasted = time.monotonic() - inside
    counter[0] = 30  # its owner started again
    telemetry.enter(None)
    longest = time.monotonic() - before
    telemetry.close()
    rows = lines(tmp_path, "rank")
    idle = [row["idle"] for row in rows if "idle" in row]
    assert len(idle) >= 4 and lasted <= sum(idle) <= longest
    assert 1 < sum(row["bytes"] > 0 for row in rows) and 330 <= sum(row["bytes"] for row in rows) <= 430


def test_unsupported_values_are_logged_once_and_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vcrd")
    nvml = FakeNvml(uuid=f"MIG-{UUID}", refused=("utilization", "power", "nvlink"))
    telemetry = recording(tmp_path, nvml, interval=0.1)
    wait_until(lambda: len(lines(tmp_path, "rank")) > 2, LONG, "three intervals are written")
    telemetry.close()
    rows = lines(tmp_path, "rank")
    assert len(rows) > 2
    for row in rows:
        assert row["gpu_memory_bytes"] and not row.keys() & {"gpu_utilization", "gpu_power_watts"}
        assert "nvlink_sent_bytes_per_second" not in row
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "telemetry of this GPU lacks utilization (Not Supported, for a MIG slice); power_watts (Not Supported, for a "
        "MIG slice); nvlink_bytes (Not Supported, for a MIG slice)"
    )


@pytest.mark.parametrize(
    ("uuid", "nvml", "reason"),
    [
        (None, None, "this rank has none"),
        (UUID, FakeNvml(uuid="GPU-other"), f"NVML does not know the GPU {UUID}: Not Found"),
    ],
)
def test_without_a_gpu_the_other_values_are_recorded(tmp_path, caplog, uuid, nvml, reason):
    caplog.set_level(logging.INFO, "vcrd")
    telemetry = Telemetry(tmp_path, "student", 3, 0.1, uuid, open_gpu=lambda name: Gpu(name, nvml))
    telemetry.add(steps=2)
    telemetry.close()
    rows = lines(tmp_path, "rank")
    assert rows[0]["steps"] == 2 and not [name for row in rows for name in row if name.startswith("gpu")]
    assert [r.getMessage() for r in caplog.records] == [f"telemetry has nothing about a GPU: {reason}"]
    assert nvml is None or nvml.open == 0


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoGpu, match="the package nvidia-ml-py is not installed"):
        Gpu(UUID)


def test_the_installed_package_has_the_called_functions():
    nvml = pytest.importorskip("pynvml")
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) >= 10 and all(hasattr(nvml, name) for name in names)
    assert (
        nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX == 138
        and nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX == 139
    )


def test_a_resumed_run_appends_after_an_incomplete_line(tmp_path):
    path = tmp_path / "deep" / "student-00000.jsonl"
    for part in range(2):
        writer = RecordFile(path)
        writer.write({"kind": "start", "part": part})
        writer.write({"kind": "rank", "part": part})
        writer.close()
        with open(path, "a") as file:
            file.write('{"kind":"rank","par')  # killed in the middle of a record
    with open(path, "ab") as file:
        file.write(b'\n[1]\n"kind"\n\xff\xfe\n{"no": 1}\n')
    assert [(r["kind"], r["part"]) for r in read_records(path)] == [
        *[("start", 0), ("rank", 0)],
        *[("start", 1), ("rank", 1)],
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_logged_once_and_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "student-00003.jsonl").symlink_to("/dev/full")
    telemetry = recording(tmp_path, None, interval=0.1)

    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    telemetry.write("figures", number=0)
    wait_until(warnings, LONG, "the disk is found full")
    for number in range(1, 20):
        telemetry.write("figures", number=number)
    telemetry.close()
    assert len(warnings()) == 1 and not threads()
    assert warnings()[0].startswith("telemetry_dir: ") and "No space left on device" in warnings()[0]


def test_a_disk_with_space_again_is_used_again(tmp_path, monkeypatch):
    import os

    writer, write, full = RecordFile(tmp_path / "run.jsonl"), os.write, [False]

    def sometimes(file: int, data: bytes) -> int:
        if full[0]:
            write(file, data[:5])  # the part that fits
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", sometimes)
    for number in range(6):
        full[0] = number in (2, 3)
        writer.write({"kind": "rank", "number": number})
    writer.close()
    assert [record["number"] for record in read_records(tmp_path / "run.jsonl")] == [0, 1, 4, 5]


def test_a_file_system_that_hangs_does_not_stop_the_run(tmp_path, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(RecordFile, "write", lambda self, record: goes_on.wait())
    monkeypatch.setattr("vcrd.monitor.telemetry._LAST_WRITES", 0.2)
    telemetry = recording(tmp_path, None, interval=0.1)
    for _ in range(20_000):
        telemetry.write("figures", loss=1.0)
    telemetry.close()  # waiting for the write would take until the limit of this test
    assert threads()
    goes_on.set()
    for thread in threads():
        thread.join(LONG)


def test_an_unclosed_telemetry_ends_with_the_interpreter(tmp_path):
    telemetry = recording(tmp_path, None, interval=30)
    del telemetry
    assert not threads() and len(lines(tmp_path, "rank")) == 1
    script = (
        "from vcrd.monitor.telemetry import Telemetry\n"
        f"kept = Telemetry({str(tmp_path)!r}, 'teacher', 0, 30.0)\n"
        "kept.write('start', number=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    kinds = [record["kind"] for record in read_records(tmp_path / "teacher-00000.jsonl")]
    assert kinds == ["start", "rank"]


def test_importing_vcrd_does_not_import_it():
    script = "import sys, vcrd, vcrd.monitor.telemetry, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"pynvml", "matplotlib", "numpy.testing", "vcrd.report.page"}
