"""The private fabric of vsockets.testing, for tests of other projects."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import FabricFailed, PrivateFabric, wait_until

from .raw_client import has_gone

TESTS = """
import vsockets

def test_passes(vsock_fabric):
    with vsockets.create_server((2, 5000), context=vsock_fabric.host):
        vsockets.create_connection((2, 5000), context=vsock_fabric.guest()).close()

def test_fails(vsock_fabric):
    vsock_fabric._log_file.write_text("vsockd: ERROR: a request was dropped")

def test_expects(vsock_fabric):
    vsock_fabric._log_file.write_text("vsockd: ERROR: a request was dropped")
    vsock_fabric.expect_errors()

def test_shows(vsock_fabric):
    vsock_fabric._log_file.write_text("the log of vsockd")
    assert False
"""


def test_the_pytest_fixture(tmp_path: Path) -> None:
    """As in a project that has installed vsockets: nothing to import, nothing to set up."""
    (tmp_path / "test_it.py").write_text(TESTS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = {
        line.split(" - ")[0].replace("test_it.py::test_", "")
        for line in run.stdout.splitlines()
        if line.startswith(("PASSED", "FAILED", "ERROR"))
    }
    # A test that has passed and then was found to have broken vsockd is both.
    assert outcomes == {
        "PASSED passes",
        "PASSED fails",
        "ERROR fails",
        "PASSED expects",
        "FAILED shows",
    }
    assert "the log of vsockd" in run.stdout


def test_start_and_stop() -> None:
    with PrivateFabric() as fabric:
        pid, folder = fabric.pid, fabric.folder
        assert fabric.host.cid == 2
        assert fabric.guest().cid == 3
        assert fabric.guest(9).cid == 9
        assert fabric.control.status()["pid"] == pid
    assert has_gone(pid)
    assert not folder.parent.exists()


def test_fabrics_are_separate() -> None:
    with PrivateFabric() as one, PrivateFabric() as other:
        assert one.pid != other.pid
        with vsockets.create_server((2, 5000), context=one.host):
            with pytest.raises(ConnectionResetError):
                vsockets.create_connection((2, 5000), context=other.host)
            vsockets.create_server((2, 5000), context=other.host).close()


def test_a_child_is_in_the_context_it_is_put_in(vsock_fabric: PrivateFabric) -> None:
    for context in (vsock_fabric.host, vsock_fabric.guest(7)):
        child = subprocess.run(
            [sys.executable, "-c", "import vsockets; print(vsockets.get_local_cid())"],
            env=vsock_fabric.environment(context),
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(child.stdout) == context.cid


def test_a_failed_start_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FabricFailed, match="vsockd did not start: vsockd: cannot start in"):
        PrivateFabric(tmp_path / "file").__enter__()


def test_killed_and_started_again() -> None:
    with PrivateFabric() as fabric:
        first = fabric.pid
        fabric.kill()
        with pytest.raises(FabricFailed, match="does not run"):
            _ = fabric.pid
        fabric.start()
        assert fabric.pid != first
        assert fabric.host.cid == 2
        fabric.stop()
        fabric.stop()
        assert os.listdir(fabric.folder) == []


def test_a_crash_is_reported() -> None:
    with pytest.raises(FabricFailed, match="status -9"), PrivateFabric() as fabric:
        os.kill(fabric.pid, signal.SIGKILL)


def test_remaining_files_are_reported() -> None:
    with pytest.raises(FabricFailed, match="vsockd left notes in"), PrivateFabric() as fabric:
        (fabric.folder / "notes").write_text("")


def test_the_blocks_own_exception_takes_precedence() -> None:
    with pytest.raises(KeyError), PrivateFabric() as fabric:
        (fabric.folder / "notes").write_text("")
        raise KeyError("mine")


def test_vsockd_ends_with_a_killed_test_run() -> None:
    program = """if True:
        import time, vsockets.testing
        with vsockets.testing.PrivateFabric() as fabric:
            print(fabric.pid, fabric.folder, flush=True)
            time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid, folder = run.stdout.readline().decode().split()
        run.kill()
    wait_until(lambda: has_gone(int(pid)), "vsockd to end")
    assert os.listdir(folder) == []
    shutil.rmtree(Path(folder).parent)


def test_waiting() -> None:
    answers = iter([None, 0, "", "here"])
    assert wait_until(lambda: next(answers)) == "here"
    with pytest.raises(AssertionError, match=r"timed out after 0.01 s waiting for rain"):
        wait_until(lambda: False, "rain", 0.01)
