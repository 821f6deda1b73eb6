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
ELSEWHERE = {"container.md": "docker/README.md"}
LINK = re.compile(r"\[[^\]]*\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for uri, path in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links that leave docs/ become the path in the checkout, because the public address of the repository is not known."""
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def placed(link: re.Match) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), link[1]))
        uris = {path: uri for uri, path in ELSEWHERE.items()}
        target = uris.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return f"`{path}`"
        relative = os.path.relpath(target, os.path.dirname(page.file.src_uri))
        return link[0].replace(f"({link[1]}", f"({relative}")

    # Markdown inside of HTML is read by GitHub after an empty line, and by mkdocs where an attribute says so.
    markdown = markdown.replace("<details><summary>", '<details markdown="1"><summary markdown="span">')
    return LINK.sub(placed, markdown)


class LazyNames(griffe.Extension):
    """Gives `vcrd` and `vcrd.megatron` the names that they load on first use, so that api.md can name them."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        for module in (pkg, pkg["megatron"]):
            for name, home in ast.literal_eval(str(module["_HOME"].value)).items():
                module.set_member(name, griffe.Alias(name, f"{home}.{name}"))
