"""``make test-kernel-tree``: the Linux kernel's source, checked out with git over NFS in a guest.

The host exports a repository with Debian's whole kernel source.  A guest (Debian 12's kernel, over
the VMCI device) mounts it, checks the source out beside it, one top-level directory after the
other, and verifies both with git; the host compares what it finds then with the original.
``python -m vm.kernel_tree PATH...`` checks parts out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conformance import kernel_suite
from vsockets.testing import PrivateFabric
from vsockets.vm.apt import run

from . import downloads
from .conftest import COMMON, Stage
from .machine import Machine
from .test_nfs import GUEST, Host

#: Seconds for one program of git in the guest.
PATIENCE = 7200.0

#: A processor without AVX, which takes QEMU's emulation three quarters of the time.
_PROCESSOR = ("-cpu", "Nehalem")

#: What the guest reads back to compare it, if it has checked out everything.
_READ_BACK = ("lib", "kernel")

_GIT = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "gc.auto=0")
_ENVIRONMENT = {"HOME": "/tmp", "GIT_CONFIG_NOSYSTEM": "1", "GIT_TEMPLATE_DIR": ""}


def repository() -> Path:
    """Return a bare repository with one commit of the whole source, made if necessary."""
    folder = kernel_suite.CACHE / "kernel" / "linux.git"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix="tree-", dir=folder.parent) as name:
            tree, new = Path(name, "tree"), Path(name, "linux.git")
            print("kernel-tree: unpacking the source", flush=True)
            kernel_suite.unpack_all(tree)
            print("kernel-tree: importing it into git", flush=True)
            git(tree, "init", "--quiet", f"--separate-git-dir={new}")
            git(tree, "add", "--all", "--force")
            git(tree, "commit", "--quiet", "--message=the kernel's source")
            git(new, "config", "core.bare", "true")
            git(new, "-c", "pack.window=0", "repack", "-adq")  # deltas of one commit are few
            (new / "index").unlink()
            new.rename(folder)
    return folder


def git(folder: Path, *arguments: str, **environment: str) -> str:
    """Run git on the host and return its output."""
    return run("git", *_GIT, *arguments, folder=folder, **_ENVIRONMENT, **environment)


def top_level(source: Path) -> list[str]:
    """Return the names in the top-level directory, those with the fewest files first."""
    paths = git(source, "ls-tree", "-r", "--name-only", "HEAD").split("\n")
    numbers = Counter(path.partition("/")[0] for path in paths if path)
    return sorted(numbers, key=lambda name: (numbers[name], name))


def differences(source: Path, work: Path, index: Path, parts: list[str]) -> str:
    """Return the names of files below ``work`` that are not as in the repository ``source``."""
    where = (f"--git-dir={source}", f"--work-tree={work}")
    environment = {"GIT_INDEX_FILE": str(index)}
    git(work, *where, "read-tree", "HEAD", **environment)
    return git(work, *where, "diff", "--name-only", "HEAD", "--", *parts, **environment)


class Steps:
    """Timed steps of the guest."""

    def __init__(self, guest: Machine) -> None:
        self._guest = guest

    def __call__(self, name: str, *arguments: str, folder: str = "/mnt/linux") -> str:
        """Run git in the guest; return its output."""
        began = time.monotonic()
        output: str = self._guest.run(
            """
            done = subprocess.run(
                ["/git", *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            assert done.returncode == 0, done.stdout[-2000:]
            result = done.stdout[-2000:]
            """,
            PATIENCE,
            arguments=[*_GIT, *arguments],
            folder=folder,
            environment={**_ENVIRONMENT, "PATH": "/:/bin"},
        )
        print(f"kernel-tree: {name}: {time.monotonic() - began:.0f} s", flush=True)
        return output


def main() -> int:
    """Return the exit status: 0 if both sides agree."""
    parts = sys.argv[1:]
    os.environ["VSOCKETS_REQUIRE_VM"] = "1"  # a missing download is an error, not a skip
    source = repository()
    with (
        tempfile.TemporaryDirectory(prefix="tree-", dir=source.parent) as name,
        PrivateFabric() as fabric,
        Stage(Path(name)).machine(fabric, "stable", memory=2048, arguments=_PROCESSOR) as guest,
    ):
        guest.run(COMMON)
        guest.put({**downloads.storage_client(), **downloads.git()})
        guest.run(GUEST)
        guest.run("load_fuse()")
        host = Host(guest, Path(name))
        subprocess.run(["cp", "-r", "--reflink=auto", source, host.export], check=True)
        host.serve()
        try:
            with host.mounted():
                steps = Steps(guest)
                steps(
                    "add a work tree",
                    *("worktree", "add", "--quiet", "--no-checkout", "--detach", "/mnt/linux"),
                    folder="/mnt/linux.git",
                )
                for part in parts or top_level(source):
                    steps(f"check out {part}", "checkout", "HEAD", "--", part)
                guest.run("forget()")
                # The mount has new inode numbers now, so git compares the contents.
                read_back = parts or _READ_BACK
                status = steps("read back", "status", "--porcelain", "--", *read_back)
                assert status == "", status
                fsck = steps("fsck", "fsck", "--full", "--strict", "--no-progress")
                assert fsck == "", fsck
        finally:
            host.kill()
        work = host.export / "linux"
        (work / ".git").unlink()
        differ = differences(source, work, Path(name, "index"), parts or ["."])
        files = [path for path in work.rglob("*") if not path.is_dir() or path.is_symlink()]
        total = sum(path.lstat().st_size for path in files)
        print(f"kernel-tree: {len(files)} files, {total / 1e6:.0f} MB", flush=True)
        assert differ == "", differ
    return 0


if __name__ == "__main__":
    sys.exit(main())
