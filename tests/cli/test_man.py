"""``vsock man``, and shell completion."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .vsock import PATIENCE, PROGRAM, Vsock


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    Vsock(folder / "state")("man", folder)
    return folder


def test_every_command_has_a_page_and_its_options_are_on_it(pages: Path) -> None:
    names = {page.name for page in pages.glob("man?/*")}
    assert {"vsock.1", "vsock-ls.1", "vsock-context-add.1", "vsockd.8"} <= names
    text = (pages / "man1" / "vsock-ls.1").read_text()
    assert text.startswith('.TH "VSOCK-LS" "1"')
    assert "vsock\\-ls \\- list the fabric's sockets" in text
    assert "\n.B \\-l, \\-\\-listening\n" in text
    assert "\n.B vsock\\-ls(1)\n" in (pages / "man1" / "vsock.1").read_text()
    assert "\n.B \\-\\-log\\-format {text,json}\n" in (pages / "man8" / "vsockd.8").read_text()


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
def test_mandoc_accepts_the_pages(pages: Path) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "error", *sorted(pages.glob("man?/*"))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    shown = subprocess.run(
        ["mandoc", "-T", "utf8", pages / "man1" / "vsock-capture.1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    ).stdout
    plain = re.sub(".\b", "", shown)  # mandoc overstrikes bold letters
    assert "       vsock capture [OPTIONS] [FROM] [TO]\n" in plain


def test_bash_completes(alone: Vsock) -> None:
    """Set the environment that bash's completion script sets when Tab is pressed."""
    alone.environment |= {
        "_VSOCK_COMPLETE": "bash_complete",
        "COMP_WORDS": "vsock con",
        "COMP_CWORD": "1",
    }
    assert alone(expect=None).stdout.split() == ["plain,context", "plain,connect"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_once_for_the_shell(
    alone: Vsock, tmp_path: Path, shell: str
) -> None:
    """Call ``vsock`` from a process named as the shell is."""
    alone.environment["HOME"] = str(tmp_path / "home")
    caller = tmp_path / shell
    caller.symlink_to(sys.executable)
    script = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    for _ in range(2):
        subprocess.run(
            [caller, "-c", script, *PROGRAM, "--install-completion"],
            env=alone.environment,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=PATIENCE,
        )
    texts = [path.read_text() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert sum("_VSOCK_COMPLETE" in text for text in texts) == 1
    loaders = [text for text in texts if "_VSOCK_COMPLETE" not in text]
    assert len(loaders) == (0 if shell == "fish" else 1)
    assert all(len(text.splitlines()) == 1 for text in loaders)
