"""Hooks of mkdocs for the site of this folder. The pages are written to work on the file tree as well."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site that are files of other folders.
ELSEWHERE = {
    "container.md": "docker/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s/][^)#:\s]*)(?P<place>#[^)\s]*)?\)")

SEVERAL = re.compile(r"^    \w+(?:, \w+)+(?=:\s)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for uri, path in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """A link that leaves docs/ becomes its path in the checkout: the public address of the repository is not known."""
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    uris = {path: uri for uri, path in ELSEWHERE.items()}

    def placed(link: re.Match) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), link["path"]))
        uri = uris.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if uri is None:
            return f"`{path}`"
        other = files.get_file_from_path(uri)
        is_name = link["text"].endswith(".md") and other is not None and other.page is not None
        text = other.page.title if is_name else link["text"]
        return f"[{text}]({os.path.relpath(uri, os.path.dirname(page.file.src_uri))}{link['place'] or ''})"

    # Markdown inside of HTML is read by GitHub after an empty line, and by mkdocs where an attribute says so.
    markdown = markdown.replace("<details><summary>", '<details markdown="1"><summary markdown="span">')
    return LINK.sub(placed, markdown)


class Interface(griffe.Extension):
    """Gives `vcrd` and `vcrd.megatron` the names that they load on first use, so that api.md can name them.

    One entry of a docstring may describe several arguments, "floor, ceiling: ..". griffe would take what follows a
    space for a type, so these spaces become en spaces.
    """

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SEVERAL.sub(
                lambda names: names[0].replace(", ", ",\u2002"), obj.docstring.value
            )

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        for module in (pkg, pkg["megatron"]):
            for name, home in ast.literal_eval(str(module["_HOME"].value)).items():
                module.set_member(name, griffe.Alias(name, f"{home}.{name}"))
