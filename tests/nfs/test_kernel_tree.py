"""A part of the Linux kernel's source in git, with repository and work tree on a mount."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conformance import kernel_suite
from forms import choose
from vsockets.testing import PrivateFabric

from .stage import NEEDS_MOUNTING, Storage, digests

pytestmark = [
    *NEEDS_MOUNTING,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]

#: What the repository has: 800 files, or a quarter of them.
TREE = choose(("fs/nfs", "scripts/kconfig"), kernel_suite.TREE)


class Repository:
    """git in a directory, without other configuration."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self("init", "--quiet")

    def __call__(self, *arguments: str) -> str:
        settings = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "gc.auto=0")
        done = subprocess.run(
            ["git", *settings, *arguments],
            cwd=self._folder,
            env={**os.environ, "HOME": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def test_git_works_on_a_mount(storage: tuple[PrivateFabric, Storage]) -> None:
    """The server first runs without loss, then is killed; its successor loses datagrams."""
    fabric, nfs = storage
    try:
        source = kernel_suite.source()
    except kernel_suite.Unavailable as error:
        pytest.skip(f"kernel source is not available: {error}")
    nfs.serve()
    work = nfs.mount(fabric.guest()) / "linux"
    work.mkdir()
    copy = 'tar -C "$0" -c "$@" | tar -x'
    subprocess.run(["sh", "-c", copy, source, *TREE], cwd=work, check=True, timeout=200)
    git = Repository(work)
    git("add", "--all", "--force")  # the kernel's .gitignore excludes some of them
    git("commit", "--quiet", "--message=a tree")

    nfs.kill_server()
    nfs.serve_with_loss(seed=5, percent=1)
    git("worktree", "add", "--quiet", "../again")
    again = work.parent / "again"
    assert git("-C", str(again), "status", "--porcelain", "--ignored") == ""
    assert git("status", "--porcelain", "--ignored") == ""
    assert git("fsck", "--full", "--strict") == ""
    files = 0
    for part in TREE:
        original = digests(source / part)
        assert digests(again / part) == digests(nfs.export / "again" / part) == original
        assert digests(nfs.export / "linux" / part) == original
        files += len(original)
    assert files > choose(200, 700)
