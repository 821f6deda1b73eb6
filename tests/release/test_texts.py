"""The version and the date of a release are the same wherever they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vcrd

yaml = pytest.importorskip("yaml")  # comes with huggingface_hub
ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
RELEASES = re.findall(
    r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.M
)


def test_package_changelog_and_citation_have_one_version():
    version, date = RELEASES[0]
    assert version == vcrd.__version__ == CITATION["version"]
    assert date == CITATION["date-released"]


def test_every_section_of_the_changelog_is_a_release_in_order():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings == ["[Unreleased]", *(f"[{version}] - {date}" for version, date in RELEASES)]
    numbers = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    assert numbers == sorted(numbers, reverse=True)
    kinds = set(re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_the_format_requires():
    """The whole file was checked against the schema of version 1.2.0 when it was written."""
    assert CITATION["cff-version"] == "1.2.0" and CITATION["message"] and CITATION["title"]
    assert CITATION["authors"] == [{"name": "The vcrd developers"}]
    (paper,) = CITATION["references"]
    assert {"type", "title", "authors"} <= set(paper)
    readme = (ROOT / "README.md").read_text()
    assert paper["title"] in readme and paper["journal"].split(":")[1] in readme
    assert f'license="{CITATION["license"]}"' in (ROOT / "setup.py").read_text()
