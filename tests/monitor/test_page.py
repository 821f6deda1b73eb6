"""The page of a run: its content, its errors, and its display in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import made_run
import pytest
from browser import Browser, chromium

from vcrd.__main__ import main

numpy = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
BROWSER = pytest.mark.skipif(
    chromium() is None, reason="there is no Chromium (on Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = made_run.write(tmp_path_factory.mktemp("runs") / "a run")
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return said.err.removeprefix("python -m vcrd report: ").strip()


def test_the_page_has_every_section(page):
    text = page.read_text()
    for part in (
        *("Warnings", "Training", "Time", "Machines", "Teacher", "Weights in a text"),
        *("Weights of the tokens", "GPU memory", "GPU utilisation", "GPU power", "NVLink", "Host memory"),
        *("4 ranks: tensor 2 x data 2", "<dd>once</dd>", "payload float16", "79 times, iterations 10 to 790"),
        *("Circles &amp; &lt;lines&gt;", "waiting for teacher replica 1", "Teacher replica 1"),
    ):
        assert part in text, part
    assert re.search(
        r"Mean step of 0\.8 s: 25 % forward, 30 % backward and pipeline, 3 % gradient reduction",
        text,
    )
    assert "Idle 60 % of the time in which a student" in text and "Idle 30 % of the time" in text
    assert "@" not in re.sub(r"base64,[^\"]*", "", text).split("</style>", 1)[1]
    assert not re.search(r"""(src|href)=["']?(http|//|file)""", text), "the page must be self-contained"


@BROWSER
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, False), (390, True)])
def test_a_browser_shows_the_whole_page(page, width, dark):
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    drawn = "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('svg')]"
    drawn += ".filter(s => s.getBoundingClientRect().width > 100).length)"
    smallest = (
        "Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().width)"
    )
    smallest += ".map(t => t.getBoundingClientRect().height))"
    with Browser() as browser:
        seen = browser.look(page, width, sizes, drawn, smallest, dark=dark)
    assert not seen.complaints and not seen.requests
    (scrolled, shown), charts, text = seen.values
    assert scrolled <= shown <= width, "no horizontal scrolling"
    assert len(charts) >= 13 and set(charts) == {1}, "each figure shows one chart"
    assert text >= 9, "pixels; smaller text cannot be read"
    assert_a_picture(seen.picture, dark)


def assert_a_picture(png: bytes, dark: bool) -> None:
    """Checks that the picture is not blank: on the ground of the page, with the colours of both jobs and of text."""
    from PIL import Image

    from vcrd.report import style

    pixels = numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int).reshape(-1, 3)
    assert 0.5 < (pixels.max(1) < 70 if dark else pixels.min(1) > 230).mean() < 0.98
    for colour in (style.TEACHER, style.STUDENT, style.INK, style.GREYS[0]):
        shown = style.on_dark(colour) if dark else colour
        near = (abs(pixels - [int(shown[n : n + 2], 16) for n in (1, 3, 5)]) < 12).all(1).mean()
        assert near > 1e-4, colour


@BROWSER
def test_an_error_and_a_request_are_found(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("oh"); throw Error("no")</script>'
    )
    with Browser() as browser:
        seen = browser.look(path, 400)
    assert seen.requests == ["http://127.0.0.1:9/x.png"] and len(seen.complaints) >= 2


def test_many_ranks_and_iterations_make_a_small_page(tmp_path, capsys):
    folder = made_run.write(tmp_path / "long", intervals=20_000, every=5, ranks=64, teachers=16, records=400)
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert len(text) < 3e6 and "5 to 100,000" in text and "64 ranks" in text
    assert "mean of 8 replicas" in text


@pytest.mark.parametrize(
    "made", [{"intervals": 1, "records": 1}, {"intervals": 2, "gpus": False}, {"intervals": 0}]
)
def test_short_runs_have_a_page(tmp_path, made):
    folder = made_run.write(tmp_path / "short", **made)
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert ("No training metrics" in text) == (made["intervals"] == 0)
    assert ("No GPU was measured" in text) == ("gpus" in made)


def test_records_of_one_job_alone_are_enough(tmp_path):
    folder = made_run.write(tmp_path / "run", intervals=5)
    for path in folder.glob("student-*"):
        path.unlink()
    assert main(["report", str(folder)]) == 0


def test_a_repeated_iteration_counts_once(tmp_path):
    from vcrd.report.run import load

    folder = made_run.write(tmp_path / "run", intervals=10)
    path = folder / "student-00003.jsonl"
    again = [line for line in path.read_text().splitlines() if '"figures"' in line][6:9]
    with open(path, "a") as file:
        file.write("\n".join(line.replace('"loss": ', '"loss": 1000') for line in again) + "\n")
    figures = load(folder).figures
    assert figures["iteration"].tolist() == [10 * n for n in range(1, 11)]
    assert [loss > 999 for loss in figures["loss"]] == [False] * 6 + [True] * 3 + [False]


def page_of(folder) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def edited(folder, change):
    """The page after `change` has replaced records of the last student rank."""
    path = folder / "student-00003.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(record)) + "\n" for record in records))
    return folder


def test_a_loss_that_is_no_number_is_marked(tmp_path):
    def change(record, last):
        iteration = record["iteration"]
        return {**record, "loss": None} if record["kind"] == "figures" and 50 <= iteration <= last else record

    folder = made_run.write(tmp_path / "run", intervals=20)
    text = page_of(edited(folder, lambda record: change(record, 90)))
    assert "The loss was NaN or infinite.<small>5 times, iterations 50 to 90" in text
    folder = made_run.write(tmp_path / "all", intervals=2)
    text = page_of(edited(folder, lambda record: {**record, "loss": None}))
    assert "twice, iterations 10 and 20" in text and "all values are NaN" in text


def test_a_run_without_parts_of_its_steps_shows_its_waits(tmp_path):
    def change(record):
        return {
            name: value for name, value in record.items() if name not in ("forward", "backward", "gradients")
        }

    text = page_of(edited(made_run.write(tmp_path / "run", intervals=5), change))
    assert re.search(r"\d+ % computing and other", text) and "% forward" not in text


def test_records_of_another_form_are_ignored(tmp_path):
    folder = made_run.write(tmp_path / "run", intervals=3, records=10)
    for content in ('{"samples": [{"name": "x"}]}', "[1]", '{"samples": [{"stages": {"a": [["b"]]}}]}', "{"):
        (folder / "tokens.json").write_text(content)
        assert "Weights in a text" not in page_of(folder)
    with open(folder / "student-00003.jsonl", "a") as file:
        for odd in (
            {"kind": "rank"},
            {"seconds": "long"},
            {"kind": "figures", "loss": "low"},
            {"kind": "figures", "weight_histogram": "none"},
            {"kind": "figures", "teacher_wait_by_replica": {"first": 1}},
        ):
            whole = {"time": made_run.BEGIN, "role": "student", "rank": 3, "iteration": 1, "kind": "rank"}
            file.write(json.dumps(odd if odd == {"kind": "rank"} else {**whole, **odd}) + "\n")
    assert "10 to 30" in page_of(folder) or "1 to 30" in page_of(folder)


def test_a_folder_above_the_records_names_their_folder(tmp_path, capsys):
    folder = made_run.write(tmp_path / "records", intervals=1)
    assert refusal(capsys, str(tmp_path)).endswith(f"got none; {folder} has some")


def test_a_page_is_utf_8_whatever_the_locale(tmp_path):
    folder = made_run.write(tmp_path / "run", intervals=2)
    (folder / "tokens.json").write_text(
        '{"samples": [{"name": "\u03c0", "stages": {"a": [["\u2265", 1.0]]}}]}'
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "vcrd", "report", str(folder)]
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "≥" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_that_cannot_be_drawn_is_one_message(tmp_path, capsys):
    assert "RUN_DIR: expected the folder of a run (telemetry_dir), got " in refusal(
        capsys, str(tmp_path / "no")
    )
    empty = refusal(capsys, str(tmp_path))
    assert empty.startswith("RUN_DIR: expected records of a run in ") and empty.endswith("got none")
    (tmp_path / "student-00000.jsonl").write_text("{}\nnonsense\n")
    assert refusal(capsys, str(tmp_path)) == empty
    folder = made_run.write(tmp_path / "run", intervals=2)
    said = refusal(capsys, str(folder), "--output", "/proc/nowhere/page.html")
    assert said == "--output: /proc/nowhere/page.html cannot be written (No such file or directory)"
    assert "RUN_DIR" in refusal(capsys)


def test_a_missing_matplotlib_is_one_message(tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None; from vcrd.__main__ import main; main(['report', '.'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "matplotlib: expected the package (pip install matplotlib), got none" in done.stderr
