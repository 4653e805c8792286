"""Keep tests from leaving traces: in the user's home folder, and in the working tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: Folders below which tools keep what they may keep; ``.gitignore`` has them, too.
TOOLS = frozenset(
    {
        *(".git", ".venv", "__pycache__", "dist"),
        *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"),
    }
)

#: The exit status of a run that left something; none of pytest's own.
LEFT = 9

#: Names in the working tree before the tests.
BEFORE = pytest.StashKey[set[str]]()

#: Variables that lead past ``HOME``.
_ELSEWHERE = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "HISTFILE")


def files(root: Path) -> set[str]:
    """Return the names of all files below ``root``, except what tools keep there."""
    found: set[str] = set()
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in TOOLS]
        found.update(os.path.relpath(os.path.join(folder, name), root) for name in names)
    return found


def replace_home(folder: Path) -> None:
    """Make ``folder`` the home folder of this process and of all that it starts.

    Downloads and compiled libraries stay where they outlive it: in ``~/.cache/vsockets``.
    """
    home = Path.home()
    cache = home / ".cache/vsockets"
    (folder / ".cache").mkdir(parents=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = folder / "cache"  # a home folder that cannot be written
        cache.mkdir()
    (folder / ".cache/vsockets").symlink_to(cache.resolve())
    if (home / ".rustup").exists():  # a compiler that is installed for this user alone
        os.environ.setdefault("RUSTUP_HOME", str(home / ".rustup"))
    for name in _ELSEWHERE:
        os.environ.pop(name, None)
    os.environ["HOME"] = str(folder)
    os.environ["MPLCONFIGDIR"] = str(cache / "matplotlib")
