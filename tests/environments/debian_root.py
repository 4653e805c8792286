"""Root folders of Debian's packages, made by mmdebstrap from this machine's mirror, and disks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vsockets.vm.apt import DEBIAN, Suite, Unavailable, cached, run

#: Room on a disk beside its files, in MiB.
_FREE = 256


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


def make_disk(disk: Path, root: Path) -> None:
    """Make the file ``disk``, an ext4 file system with the files of ``root``.

    Raises Unavailable.
    """
    size = int(run("du", "--summarize", "--block-size=1M", str(root)).split()[0]) + _FREE
    # mkfs.ext4 is in root's PATH only.
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    command = ("mkfs.ext4", "-q", "-O", "^has_journal", "-d", str(root), str(disk), f"{size}M")
    run(*command, PATH=search)


def systemd_disk(release: str, packages: Sequence[str]) -> Path:
    """Return the disk of a machine with ``packages``, made if it is missing.

    Raises Unavailable.
    """

    def fill(folder: Path) -> None:
        if os.geteuid() != 0:
            raise Unavailable("needs root")
        root = folder / "root"
        make_root(root, release, packages, "--mode=root", "--variant=minbase")
        make_disk(folder / "disk", root)
        shutil.rmtree(root)

    identity = hashlib.sha256(json.dumps([release, packages]).encode()).hexdigest()[:12]
    return cached(f"systemd-{identity}", fill) / "disk"
