"""A mount namespace for the tests: what is mounted in it, only they see."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: The working tree.
TREE = Path(__file__).resolve().parents[2]

#: The variable that tells the process within the namespace that it is there.
_WITHIN = "VSOCKETS_TESTS_WITHIN"

#: pytest's; much of the time a test waits.
WORKERS = "4"

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


def is_within() -> bool:
    """Return whether this process is the one in the namespace."""
    return _WITHIN in os.environ


def problem() -> str:
    """Return why no mount namespace can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "only root can make a mount namespace"
    try:
        # A file that is bound over itself: a container may allow the namespace alone.
        subprocess.run(
            [*_UNSHARE, "mount", "--bind", "/etc/passwd", "/etc/passwd"],
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError as error:
        return f"{error.filename} is missing: apt install util-linux mount"
    except subprocess.CalledProcessError as error:
        return f"no mount namespace: {error.stderr.strip()}"
    return ""


_UNSHARE = ("unshare", "--mount", "--propagation", "private", "--")


def enter(module: str, *arguments: str) -> int:
    """Run ``python -m module arguments`` in a mount namespace and return its exit status."""
    return subprocess.run(
        [*_UNSHARE, sys.executable, "-m", module, *arguments],
        env={**os.environ, _WITHIN: "1"},
        check=False,
    ).returncode


def mount(*arguments: str | os.PathLike[str]) -> None:
    """Run mount(8)."""
    subprocess.run(["mount", *arguments], check=True)


def bind(source: Path, target: Path, read_only: bool = False) -> None:
    """Show ``source`` at ``target``, with what is mounted below it."""
    mount("--rbind", source, target)
    if read_only:
        mount("-o", "remount,bind,ro", target)


def expose(paths: Sequence[Path], stage: Path) -> None:
    """Let every user reach ``paths``, also behind folders that are root's alone.

    Those folders show nothing else then.  ``stage`` is an empty folder for the time being.
    """
    closed = {folder for path in paths if (folder := _first_closed(path))}
    for number, folder in enumerate(closed):
        staged = {}
        for part, path in enumerate(path for path in paths if folder in path.parents):
            staged[path] = stage / f"{number}-{part}"
            staged[path].mkdir()
            bind(path, staged[path])
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
        for path, place in staged.items():
            path.mkdir(parents=True)
            bind(place, path)


def _first_closed(path: Path) -> Path | None:
    """Return the outermost folder above ``path`` that other users may not enter."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None
