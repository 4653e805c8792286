"""The folders of ``examples/``, each with the commands of its page, run as they are printed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from c_compiler import require_compiler
from documentation.markdown import Block, blocks
from supervisor.test_languages import GO
from vm import downloads

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

#: Timeout of the commands of a block, in seconds: some compile a library, the first time.
_PATIENCE = 170.0

#: Runs the commands of an example's page that contain a word, with more environment variables:
#: (name, word, variables).
RunPage = Callable[..., None]


def pastes_of(name: str) -> list[Block]:
    """Return the blocks of commands of an example's page; each has output to see."""
    found = list(blocks(EXAMPLES / name / "README.md"))
    assert found, f"examples/{name} has no commands"
    for block in found:
        assert block.language == "sh", f"examples/{name}, line {block.line}: expected sh"
        assert block.seen, f"examples/{name}, line {block.line}: no 'You see `…`'"
    for block in found[:-1]:  # readers paste all of them into one shell
        assert "cd " not in block.text, f"examples/{name}, line {block.line}: leaves the folder"
    return found


@pytest.fixture
def run_page(tmp_path: Path) -> RunPage:
    """Run a page's commands in a copy of its folder: they may leave files there."""

    def run(name: str, word: str = "", **environment: str) -> None:
        shutil.copytree(EXAMPLES / name, tmp_path / "examples" / name)
        chosen = [block for block in pastes_of(name) if word in block.text]
        assert chosen
        for block in chosen:
            _run(block, tmp_path, environment)

    return run


def _run(block: Block, folder: Path, environment: Mapping[str, str]) -> None:
    """Run commands in ``folder``, which ``/tmp`` becomes in them, and check their output."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    vsock = programs / "vsock"
    vsock.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vsockets.cli "$@"\n')
    vsock.chmod(0o755)
    path = (programs, Path(sys.executable).parent, os.environ["PATH"])
    done = subprocess.run(
        ["sh", "-ec", block.text.replace("/tmp/", f"{folder}/")],  # other tests may use /tmp
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(map(str, path)), **environment},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for seen in block.seen:
        assert seen in done.stdout, done.stdout + done.stderr


def fetched(fetch: Callable[[], Path]) -> Path:
    """Return what ``fetch`` does; skip the test where Debian's packages cannot be had."""
    try:
        return fetch()
    except downloads.Unavailable as error:
        if os.environ.get("VSOCKETS_REQUIRE_VM"):
            raise
        pytest.skip(f"no {fetch.__name__.replace('_', ' ')}: {error}")


@pytest.fixture(scope="module")
def go() -> dict[str, str]:
    """The environment variables of a ``go`` that finds Debian's libraries, without downloads."""
    if shutil.which("go") is None:
        pytest.skip("no go: apt install what .ci/run does")
    return {**GO, "GOPATH": str(fetched(downloads.go_libraries))}


@pytest.fixture(scope="module")
def cargo() -> dict[str, str]:
    """The environment variables of a ``cargo`` that finds Debian's crates, without downloads."""
    require_compiler("cc")  # as linker
    if shutil.which("cargo") is None:
        pytest.skip("no cargo: apt install what .ci/run does")
    home = fetched(downloads.rust_libraries)
    # Compiled libraries outlive the run, and are small.
    target = (Path.home() / ".cache/vsockets/cargo-target").resolve()
    remove_old_programs(target)
    return {
        # Cargo compiles again what has another path: the tests' home folder has a link.
        "CARGO_HOME": str(home.resolve()),
        "CARGO_NET_OFFLINE": "true",
        "CARGO_TARGET_DIR": str(target),
        "CARGO_INCREMENTAL": "0",
        "CARGO_PROFILE_DEV_DEBUG": "0",
    }


def remove_old_programs(target: Path) -> None:
    """Remove what earlier runs compiled from their copies of the examples, unless they go on."""
    an_hour_ago = time.time() - 3600
    for folder in ("deps", ".fingerprint"):
        for path in target.glob(f"debug/{folder}/*agent-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > an_hour_ago:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
