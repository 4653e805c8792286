"""Root folders of Debian's packages, made by mmdebstrap from this machine's mirror."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vsockets.vm.apt import DEBIAN, Suite, Unavailable, run


def make_root(folder: Path, release: str, packages: Sequence[str], *options: str) -> None:
    """Fill ``folder`` with ``packages`` of a release; ``options`` are mmdebstrap's.

    Raises Unavailable.
    """
    if shutil.which("mmdebstrap") is None:
        raise Unavailable("mmdebstrap is missing: apt install mmdebstrap")
    # One setting of the machine's configuration applies: its mirror may be a frozen snapshot.
    setting = run("apt-config", "dump", "Acquire::Check-Valid-Until").strip()
    source = f"deb [signed-by={DEBIAN.keys}] {Suite(DEBIAN, release).mirror()} {release} main"
    command = ("mmdebstrap", "--quiet", *options, f"--aptopt={setting}")
    run(*command, f"--include={','.join(packages)}", release, str(folder), source)
