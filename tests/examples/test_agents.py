"""Agents in several languages, each with its suite, as their pages have readers run them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from c_compiler import require_compiler
from cli.vsock import PATIENCE, PROGRAM
from supervisor.test_languages import GO
from vm import downloads

from .conftest import RunPage


def test_python(run_page: RunPage) -> None:
    run_page("python")


def test_c(run_page: RunPage) -> None:
    require_compiler("cc")
    if shutil.which("make") is None:
        pytest.skip("no make: apt install what .ci/run does")
    run_page("c")


@pytest.fixture(scope="module")
def go() -> dict[str, str]:
    """The environment variables of a ``go`` that finds Debian's libraries, without downloads."""
    if shutil.which("go") is None:
        pytest.skip("no go: apt install what .ci/run does")
    try:
        return {**GO, "GOPATH": str(downloads.go_libraries())}
    except downloads.Unavailable as error:
        pytest.skip(f"no Go libraries: {error}")


def test_go(run_page: RunPage, go: dict[str, str]) -> None:
    run_page("go", **go)


def test_the_go_librarys_own_suite_passes_in_a_guest(go: dict[str, str]) -> None:
    command = [*PROGRAM, "fabric", "--cid", "3", "--", "go", "test", "github.com/mdlayher/vsock"]
    done = subprocess.run(
        [*command, "-count=1", "-v"],
        env={**os.environ, **go},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- PASS: TestIntegrationContextIDGuest" in done.stdout
    assert "--- PASS: TestIntegrationNettestTestConn" in done.stdout


@pytest.fixture(scope="module")
def cargo() -> dict[str, str]:
    """The environment variables of a ``cargo`` that finds Debian's crates, without downloads."""
    require_compiler("cc")  # as linker
    if shutil.which("cargo") is None:
        pytest.skip("no cargo: apt install what .ci/run does")
    try:
        home = downloads.rust_libraries()
    except downloads.Unavailable as error:
        pytest.skip(f"no Rust libraries: {error}")
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
        for path in target.glob(f"debug/{folder}/agent-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > an_hour_ago:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


@pytest.mark.timeout(240)  # 15 s of compiling libraries, the first time
def test_rust(run_page: RunPage, cargo: dict[str, str]) -> None:
    run_page("rust", **cargo)
