"""Results of `make gpu-check`: one JSON file per stage, its content, and whether it is up to date.

A result is stale if a file that its stage tests has changed. The result has a digest of these files, because a copy on
a machine with a GPU may have wrong file times and no git.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "performance" / "gpu"

MISSING, STALE, FAILED, UNAVAILABLE, PASSED = "missing", "stale", "failed", "unavailable", "passed"


@dataclass(frozen=True)
class Finding:
    """The result of a stage. passed: None if it cannot run on this machine; `how` then says why."""

    passed: bool | None
    how: str
    figures: dict = field(default_factory=dict)
    text: str = ""  # printed, not kept


def files(patterns: Sequence[str], root: Path = ROOT) -> list[Path]:
    """Files below `root` that match any of these globs, sorted. A glob after "!" removes its files."""
    found: set[Path] = set()
    for pattern in patterns:
        matched = {path for path in root.glob(pattern.removeprefix("!")) if path.is_file()}
        found = found - matched if pattern.startswith("!") else found | matched
    return sorted(path for path in found if "__pycache__" not in path.parts)


def digest(patterns: Sequence[str], root: Path = ROOT) -> str:
    """SHA-256 of the names and contents of these files."""
    whole = hashlib.sha256()
    for path in files(patterns, root):
        contents = path.read_bytes()
        whole.update(f"{path.relative_to(root).as_posix()}\0{len(contents)}\0".encode())
        whole.update(contents)
    return whole.hexdigest()


def read(folder: Path, name: str) -> dict | None:
    """The result of a stage; None if no result can be read."""
    try:
        result = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def write(folder: Path, name: str, result: dict) -> None:
    """Writes atomically: if the run is killed here, the previous result stays."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
        os.chmod(temporary, 0o644)  # mkstemp creates files that only the owner can read
        os.replace(temporary, folder / f"{name}.json")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def state(result: dict | None, sources: str) -> str:
    """The state of a result. sources: the current digest of the tested files."""
    if result is None:
        return MISSING
    if result.get("sources") != sources:
        return STALE
    return {True: PASSED, False: FAILED}.get(result.get("passed"), UNAVAILABLE)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit(root: Path = ROOT) -> dict:
    """commit: from git, else VCRD_COMMIT, else "unknown". dirty: whether the tree differs; None: unknown."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Only this checkout: git would also answer for a repository around a copy.
    head = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    if head is None:
        return {"commit": os.environ.get("VCRD_COMMIT") or "unknown", "dirty": None}
    # Results do not count, because each stage writes one.
    changed = git("status", "--porcelain", "--", ".", f":(exclude){FOLDER.relative_to(ROOT).as_posix()}")
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def without_paths(text: str) -> str:
    """The text without the folders of this machine."""
    for folder, name in (
        (f"{ROOT}/", ""),
        (f"{sys.prefix}/", "PREFIX/"),
        (f"{sys.base_prefix}/", "PREFIX/"),
        (f"{tempfile.gettempdir()}/", "TMP/"),
        (f"{Path.home()}/", "~/"),
    ):
        if len(folder) > 2:  # the home may be "/"
            text = text.replace(folder, name)
    return text
