"""After a crash vsockd is started as before, or not at all; isolated guests stay isolated."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.control import Control
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import has_gone

PATIENCE = 20.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a state folder's path, short enough for a socket; vsockd is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as scratch:
        folder = Path(scratch, "fabric")
        yield folder
        with contextlib.suppress(OSError), Control(folder) as control:
            control.stop()


@pytest.fixture
def configuration(folder: Path) -> Path:
    """Return a configuration that makes guest 3 restricted."""
    made = folder.with_name("configuration")
    made.mkdir()
    (made / "a.toml").write_text('[[context]]\ncid = 3\nprofile = "restricted"\n')
    return made


def command(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command, with no other configuration than ``more`` names."""
    environment = {**os.environ, "VSOCKETS_CONFIG": "/nonexistent", **more}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def use(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program that needs vsockd."""
    program = "import vsockets; print(vsockets.get_local_cid())"
    return command("-c", program, VSOCKETS_DIR=str(folder), **more)


def up(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return command("-m", "vsockets.cli", "--dir", folder, "up", **more)


def profiles(folder: Path) -> dict[int, str]:
    with Control(folder) as control:
        return {row["cid"]: row["profile"] for row in control.contexts()}


def kill(folder: Path, number: int = signal.SIGKILL) -> None:
    """Kill vsockd for good: its holder, and with it vsockd."""
    with Control(folder) as control:
        status = control.status()
    pid = status["pid"]
    os.kill(status["holder"] or pid, number)
    wait_until(lambda: has_gone(pid), "vsockd to end", PATIENCE)


def test_a_program_does_not_replace_a_vsockd_started_by_a_command(
    folder: Path, configuration: Path
) -> None:
    with PrivateFabric(folder) as fabric:
        fabric.kill()
        refused = use(folder)
        assert refused.returncode == 1
        assert "not started on demand: vsockd was started by a command" in refused.stderr
        assert str(fabric.configuration) in refused.stderr
        refused = command("-m", "vsockets.cli", "--dir", folder, "run", "true")
        assert refused.returncode != 0
        assert "not started on demand" in refused.stderr
        with pytest.raises(OSError, match="vsockd is not running"):
            Control(folder)
        fabric.start()


def test_nor_does_a_command_with_another_configuration(folder: Path, configuration: Path) -> None:
    assert up(folder, VSOCKETS_CONFIG=str(configuration)).returncode == 0
    kill(folder)
    refused = up(folder)
    assert refused.returncode == 1
    assert f"the vsockd that has ended here had {configuration}" in refused.stderr
    assert up(folder, VSOCKETS_CONFIG=str(configuration)).returncode == 0
    assert profiles(folder)[3] == "restricted"


def test_a_vsockd_started_on_demand_is_started_so_again(folder: Path, configuration: Path) -> None:
    first = use(folder, VSOCKETS_CONFIG=str(configuration))
    assert (first.stdout, first.stderr) == ("2\n", "")
    kill(folder)
    assert "the vsockd that has ended here had" in use(folder).stderr
    again = use(folder, VSOCKETS_CONFIG=str(configuration))
    assert (again.stdout, again.stderr) == ("2\n", "")
    assert profiles(folder)[3] == "restricted"


def test_after_a_stop_any_start_is_allowed(folder: Path, configuration: Path) -> None:
    with PrivateFabric(folder) as fabric:
        fabric.guest(3, profile="restricted")
        fabric.stop()
        assert use(folder).stdout == "2\n"
        kill(folder, signal.SIGTERM)
        fabric.start()
        fabric.guest(3)
        assert profiles(folder)[3] == "default"


def test_a_stale_record_is_ignored(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for text in ("", "[]", '{"how": "as a service", "configuration": "/x", "boot": "another"}'):
        (folder / "vsockd.start").write_text(text)
        assert use(folder).stdout == "2\n"
        with Control(folder) as control:
            control.stop()
        wait_until(lambda: not os.listdir(folder), "vsockd to end", PATIENCE)


@contextlib.contextmanager
def service(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start vsockd as systemd does."""
    name = f"{folder}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(name)
        words = [sys.executable, "-m", "vsockets.daemon", "--dir", str(folder)]
        process = subprocess.Popen(words, env={**os.environ, "NOTIFY_SOCKET": name})
        try:
            assert b"READY=1" in manager.recv(100)
            os.unlink(name)
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_service_is_started_by_its_manager_only(folder: Path, number: int) -> None:
    """Also while it is stopped: a restart is a stop and a start."""
    with service(folder) as process:
        with Control(folder) as control:
            control.add_context(3, profile="restricted")
        process.send_signal(number)
        process.wait(PATIENCE)
        said = use(folder).stderr
        assert "vsockd was started as a service" in said
        assert f"or remove {folder}/vsockd.start to allow" in said
    with service(folder), Control(folder) as control:
        assert control.add_context(3)["profile"] == "restricted"
        control.stop()  # by an administrator: for good
        wait_until(lambda: not os.listdir(folder), "vsockd to end", PATIENCE)
        assert use(folder).stdout == "2\n"


# Guests


def test_isolated_guests_stay_isolated(vsock_fabric: PrivateFabric) -> None:
    control = vsock_fabric.control
    for cid, profile in ((3, "restricted"), (4, "default"), (5, "restricted"), (6, "restricted")):
        control.add_context(cid, profile=profile)
    control.remove_context(6)
    for _ in range(2):  # what was remembered is so again
        vsock_fabric.kill()
        vsock_fabric.start()
        control = vsock_fabric.control
        with Control(vsock_fabric.folder) as lessee:
            assert lessee.add_context(3, lease=True)["profile"] == "restricted"
        wait_until(lambda: len(vsock_fabric.control.contexts()) == 1, "the lease to end", PATIENCE)
        assert control.add_context(3)["profile"] == "restricted"
        assert control.add_context(4)["profile"] == "default"
        assert control.add_context(6)["profile"] == "default"
        # A guest that asks for no CID does not get one of them.
        assert control.add_context(None)["cid"] == 7
        assert control.add_context(5, profile="default")["profile"] == "default"
        control.remove_context(5)
        assert control.add_context(5)["profile"] == "default"
        control.remove_context(5)
        control.add_context(5, profile="restricted")
    control.remove_context(3)
    assert control.add_context(3)["profile"] == "default"


def test_the_configuration_overrides_the_record(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.guest(3, profile="restricted")
    vsock_fabric.kill()
    (vsock_fabric.configuration / "a.toml").write_text("[[context]]\ncid = 3\n")
    vsock_fabric.start()
    assert vsock_fabric.control.contexts()[-1]["profile"] == "default"
    (vsock_fabric.configuration / "a.toml").write_text(
        '[[context]]\ncid = 3\nprofile = "restricted"\n'
    )
    vsock_fabric.control.reload()
    vsock_fabric.kill()
    (vsock_fabric.configuration / "a.toml").unlink()
    vsock_fabric.start()
    assert vsockets.get_local_cid(context=vsock_fabric.guest(3)) == 3
    assert vsock_fabric.control.contexts()[-1]["profile"] == "restricted"
