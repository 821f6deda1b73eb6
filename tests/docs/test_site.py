"""The site of docs/: its groups, its Python interface, and the check that it loads nothing from another server.

`make docs` builds the site and runs the check. These tests need no mkdocs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from check_site import main, problems

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (ROOT / "mkdocs.yml").read_text()
API = (ROOT / "docs/api.md").read_text()
INDEX = (ROOT / "docs/README.md").read_text()
ELSEWHERE = {
    page: f"../{path}"
    for page, path in re.findall(r'"([a-z]+\.md)": "([^"]+)"', (ROOT / "docs/site_hooks.py").read_text())
}


def groups_of_nav() -> dict[str, list[str]]:
    """The pages of each group in mkdocs.yml, with the paths of those that are files of other folders."""
    nav = re.search(r"\nnav:\n(.*?)\n\n", CONFIG, re.DOTALL)[1]
    found: dict[str, list[str]] = {}
    for line in nav.splitlines():
        title, page = re.fullmatch(r" +- (.+?):(?: (.+))?", line).groups()
        if page is None:
            found[title] = []
        elif found:
            list(found.values())[-1].append(ELSEWHERE.get(page, page))
    return found


def groups_of_index() -> dict[str, list[str]]:
    sections = re.split(r"^## ", INDEX, flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: [
            page
            for row in section.splitlines()
            if row.startswith("| [")
            for page in re.findall(r"\]\(([^)]+)\)", row)
        ]
        for section in sections
    }


def test_the_index_and_the_site_have_the_same_groups():
    nav = groups_of_nav()
    assert list(nav) == ["Tutorials", "How-to", "Reference", "Explanation", "Development"]
    assert groups_of_index() == nav
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    listed = [page for group in nav.values() for page in group]
    assert len(listed) == len(set(listed)) and set(listed) - set(ELSEWHERE.values()) == pages


def lazy_names(package: str) -> list[str]:
    for node in ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_HOME":
            return [f"{package}.{name}" for name in ast.literal_eval(node.value)]
    raise AssertionError(package)


def names_of_the_link() -> list[str]:
    for node in ast.parse((ROOT / "vcrd/link/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return [f"vcrd.link.{name}" for name in ast.literal_eval(node.value)]
    raise AssertionError("vcrd.link")


def names_of_integrations() -> list[str]:
    """What their pages import or name."""
    found = set()
    for page in (ROOT / "docs/integrations").glob("*.md"):
        text = page.read_text()
        found.update(re.findall(r"vcrd\.integrations\.\w+\.\w+", text))
        for module, names in re.findall(r"from (vcrd\.integrations\.\w+) import ([\w, ]+)", text):
            found.update(f"{module}.{name}" for name in names.split(", "))
    return sorted(found)


def test_the_python_interface_is_complete():
    shown = re.findall(r"^::: (\S+)$", API, re.MULTILINE)
    assert len(shown) == len(set(shown))
    public = [*lazy_names("vcrd"), *lazy_names("vcrd.megatron"), *names_of_the_link()]
    assert len(public) > 40
    assert set(public) == {name for name in shown if not name.startswith("vcrd.integrations.")}
    named = names_of_integrations()
    assert len(named) >= 8 and set(named) <= set(shown)


@pytest.mark.parametrize(
    "module", sorted({name.rpartition(".")[0] for name in re.findall("^::: (.+)", API, re.M)})
)
def test_what_is_shown_of_an_integration_exists(module):
    if not module.startswith("vcrd.integrations."):
        return
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    documented = {node.name for node in tree.body if hasattr(node, "name") and ast.get_docstring(node)}
    assert {
        name.rpartition(".")[2] for name in re.findall(rf"^::: ({module}\.\w+)$", API, re.M)
    } <= documented


@pytest.fixture
def site(tmp_path) -> Path:
    """A small site that loads only its own files."""
    (tmp_path / "a").mkdir()
    (tmp_path / "style.css").write_text(
        "/* @import 'https://x.org/a.css' */ p { background: url(picture.svg#x) }"
    )
    (tmp_path / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><use href='#x'/></svg>")
    (tmp_path / "404.html").write_text("<link rel=stylesheet href=/style.css>")
    (tmp_path / "index.html").write_text(
        "<link rel='stylesheet' href='style.css?1'><link rel=canonical href='https://x.org/'>"
        "<a href='https://x.org'>x</a><img src='data:image/png;base64,AA=='>"
    )
    (tmp_path / "a/page.html").write_text("<img src='../picture.svg'><code>url(https://x.org)</code>")
    return tmp_path


def test_a_site_of_its_own_files_passes(site):
    assert list(problems(site)) == [] and main(str(site)) == 0


@pytest.mark.parametrize(
    "planted",
    [
        "<script src='https://x.org/a.js'></script>",
        "<script src='//x.org/a.js'></script>",
        "<link rel='preconnect' href='https://fonts.x.org'>",
        "<link href='https://x.org/a.css' rel=stylesheet>",
        "<img srcset='../picture.svg 1x, https://x.org/b.png 2x'>",
        "<iframe src='http://x.org'></iframe>",
        "<svg><image xlink:href='https://x.org/a.png'/></svg>",
        "<p style='background: url(https://x.org/a.png)'>",
        '<style>@import "https://x.org/a.css";</style>',
        "<style>@font-face { src: url('//x.org/a.woff2') }</style>",
        "<img src='/picture.svg'>",
        "<img src='missing.svg'>",
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(site, planted, capsys):
    (site / "a/page.html").write_text(planted)
    (line,) = problems(site)
    assert line.startswith("a/page.html: loads ")
    assert main(str(site)) == 1 and line in capsys.readouterr().err


def test_what_a_style_sheet_loads_from_elsewhere_is_found(site):
    (site / "style.css").write_text("@import url(https://x.org/a.css); @import 'https://x.org/b.css';")
    assert len(list(problems(site))) == 2


def test_a_folder_without_a_site_is_refused(tmp_path, capsys):
    assert main(str(tmp_path)) == 1
    assert "expected a built site" in capsys.readouterr().err
