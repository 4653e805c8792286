"""Sphinx's settings: ``make site`` builds the documentation site of these pages.

The folder of sources is the repository, so that links between its pages are the same in the site
and in the repository.  The navigation is made of the headings and tables of docs/README.md.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
_INDEX = _ROOT / "docs/README.md"

project = str(_PROJECT["name"])
author = "the authors of vsockets"
version = release = str(_PROJECT["version"])

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/**.md"]
exclude_patterns = [".*", ".*/**", "site/**"]
suppress_warnings = ["myst.header"]  # a page may begin below level 1

myst_heading_anchors = 6
highlight_language = "none"

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    """Register this module's steps."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _make_index)


def _add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Append one list of pages for each heading of docs/README.md to the first page."""
    if page != root_doc:
        return
    listed = {root_doc}
    lists = ["```{toctree}\n:hidden:\n\ndocs/README\n```"]
    parts = re.split(r"^## (.+)\n", _INDEX.read_text(), flags=re.MULTILINE)
    for caption, text in zip(parts[1::2], parts[2::2], strict=True):
        links = re.findall(r"\]\(([^)#]+\.md)\)", text)
        pages = [(_INDEX.parent / link).resolve().relative_to(_ROOT) for link in links]
        names = [str(path.with_suffix("")) for path in pages]
        names = [name for name in dict.fromkeys(names) if name not in listed]
        listed.update(names)
        lists.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *names, "```"]))
    source[0] += "\n\n" + "\n\n".join(lists) + "\n"


def _make_index(app: Sphinx, error: Exception | None) -> None:
    """Show the first page for the site's address itself, too."""
    if error is None:
        shutil.copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")
