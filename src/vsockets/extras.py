"""Commands, shown in messages, that install optional dependencies of this package."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shlex
import urllib.parse
from pathlib import Path


def how_to_install(extra: str = "") -> str:
    """Return the command that installs the package with its dependencies and those of ``extra``.

    The package is not in an index, so the command names the clone that the package was installed
    from, as pip has recorded it (PEP 610).
    """
    suffix = f"[{extra}]" if extra else ""
    clone = _clone()
    if clone is None:
        return f"pip install {shlex.quote(f'.{suffix}')} in a clone of vsockets"
    return f"pip install {shlex.quote(f'{clone}{suffix}')}"


def _clone() -> Path | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        note = importlib.metadata.distribution("vsockets").read_text("direct_url.json")
        url = urllib.parse.urlsplit(json.loads(note or "{}")["url"])
        path = Path(urllib.parse.unquote(url.path))
        if url.scheme == "file" and (path / "pyproject.toml").exists():
            return path
    root = Path(__file__).parents[2]  # run from a clone without being installed
    return root if (root / "pyproject.toml").exists() else None
