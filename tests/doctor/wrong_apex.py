"""The distribution that a plain `pip install apex` brings: its metadata and the outline of its modules."""

from __future__ import annotations

from pathlib import Path

METADATA = """\
Metadata-Version: 2.1
Name: apex
Version: 0.9.10.dev0
Summary: Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions
Home-page: http://thesoftwarestudio.com/apex/
License: MIT
Requires-Dist: pyramid >1.1.2
"""


def install(folder: Path) -> Path:
    """Into a folder that is to be on the path."""
    package, metadata = folder / "apex", folder / "apex-0.9.10.dev0.dist-info"
    for each in (package, metadata, package / "lib"):
        each.mkdir(parents=True)
    (package / "__init__.py").write_text("from pyramid.config import Configurator\n")
    for name in ("forms.py", "models.py", "views.py", "lib/__init__.py"):
        (package / name).touch()
    (metadata / "METADATA").write_text(METADATA)
    return folder
