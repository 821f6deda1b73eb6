"""Fails if a page of a built site would load anything from another server. `make docs` runs it. Needs no packages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser loads by itself: attributes by tag. A link (`a`) is loaded only when the reader follows it.
LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src", "srcdoc"),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
# A link of these kinds is only named in the page.
NAMED = {"alternate", "author", "canonical", "license", "next", "prev"}
IN_STYLE = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value}
        self._in_style = tag == "style"
        self.loads += in_style(given.get("style", ""))
        if tag == "link" and set(given.get("rel", "").split()) <= NAMED:
            return
        for name in LOADED.get(tag, ()):
            value = given.get(name, "")
            urls = [part.split()[0] for part in value.split(",") if part.strip()]
            self.loads += urls if name == "srcset" else filter(None, [value])

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loads += in_style(data)


def in_style(text: str) -> list[str]:
    return [first or second for first, second in IN_STYLE.findall(COMMENT.sub("", text))]


def loads(file: Path) -> list[str]:
    """The URLs that a browser loads for this page or style sheet."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".css":
        return in_style(text)
    page = _Page()
    page.feed(text)
    page.close()
    return page.loads


def problems(site: Path) -> Iterator[str]:
    """A line for each URL that is not relative, or that leads to no file of the site."""
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]):
        # This page is shown in the place of any other, so its URLs begin at the root of the server.
        is_anywhere = file == site / "404.html"
        for url in loads(file):
            parts = urlsplit(url)
            if parts.scheme == "data" or not (parts.scheme or parts.netloc or parts.path):
                continue
            path = unquote(parts.path)
            relative = path.lstrip("/") if is_anywhere else path
            if parts.scheme or parts.netloc or relative.startswith("/"):
                yield f"{file.relative_to(site)}: loads {url}, which is not relative"
            elif not (file.parent / relative).exists():
                yield f"{file.relative_to(site)}: loads {url}, which is not there"


def main(folder: str) -> int:
    site = Path(folder)
    if not (site / "index.html").exists():
        print(f"{folder}: expected a built site, got no index.html", file=sys.stderr)
        return 1
    found = list(problems(site))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
