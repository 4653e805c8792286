"""Installation of extras, from the clone that this package was installed from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shlex
import urllib.parse
from pathlib import Path


def how_to_install(extra: str) -> str:
    """Return the command that installs ``extra``.

    The package is not in an index.  pip has recorded which clone it was installed from (PEP 610).
    """
    clone = _clone()
    if clone is None:
        return f"pip install '.[{extra}]' in a clone of vsockets"
    return f"pip install {shlex.quote(f'{clone}[{extra}]')}"


def _clone() -> Path | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        note = importlib.metadata.distribution("vsockets").read_text("direct_url.json")
        url = urllib.parse.urlsplit(json.loads(note or "{}")["url"])
        path = Path(urllib.parse.unquote(url.path))
        if url.scheme == "file" and (path / "pyproject.toml").exists():
            return path
    root = Path(__file__).parents[2]  # run from a clone without being installed
    return root if (root / "pyproject.toml").exists() else None
