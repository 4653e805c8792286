"""vsockd's life cycle: start, exclusion of a second one, stop, and clean-up after a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import vsockets
from vsockets.control import Control
from vsockets.limits import LOG_FILE_MAX_BYTES
from vsockets.testing import FabricFailed, PrivateFabric, wait_until

from .raw_client import ask_once, assert_serves, connect, has_gone, paused

VSOCKD = [sys.executable, "-m", "vsockets.daemon"]
PATIENCE = 10.0

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a state folder's path, short enough for a socket; vsockd is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as scratch:
        folder = Path(scratch, "fabric")
        yield folder
        with contextlib.suppress(OSError), Control(folder) as control:
            control.stop()


def run_vsockd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a vsockd that is expected to exit."""
    return subprocess.run(
        [*VSOCKD, "--dir", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@contextlib.contextmanager
def vsockd_in_foreground(
    folder: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a vsockd that may not be ready yet."""
    process = subprocess.Popen([*VSOCKD, "--dir", str(folder)], env=environment)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


def main_process(control: Control) -> int:
    """Return the process id of vsockd's holder, or vsockd's own without one."""
    status = control.status()
    return int(status["holder"] or status["pid"])


def is_served(folder: Path) -> bool:
    try:
        Control(folder).close()
    except OSError:
        return False
    return True


# Readiness


def test_ready_on_a_descriptor(folder: Path) -> None:
    ready, announce = os.pipe()
    process = subprocess.Popen(
        [*VSOCKD, "--dir", str(folder), "--ready-fd", str(announce)], pass_fds=[announce]
    )
    os.close(announce)
    with open(ready, "rb") as announcement:
        assert announcement.read() == b"ready\n"  # and the end: it does not keep the descriptor
    with Control(folder) as control:
        assert main_process(control) == process.pid
    process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("name", ["{folder}.notify", "@vsockets-test-{pid}"])
def test_ready_for_the_service_manager(folder: Path, name: str) -> None:
    name = name.format(folder=folder, pid=os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(name.replace("@", "\0"))
        with vsockd_in_foreground(folder, {**os.environ, "NOTIFY_SOCKET": name}) as process:
            assert b"READY=1" in manager.recv(100).splitlines()
            with Control(folder) as control:
                assert main_process(control) == process.pid


def test_a_missing_service_manager_is_ignored(folder: Path) -> None:
    nobody = {**os.environ, "NOTIFY_SOCKET": f"{folder}.nobody"}
    with vsockd_in_foreground(folder, nobody) as process:
        wait_until(lambda: process.poll() is not None or is_served(folder))
        assert process.poll() is None


def test_in_the_background_it_serves_when_it_returns(folder: Path) -> None:
    finished = run_vsockd(folder, "--background")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    with Control(folder) as control:
        pid = control.status()["pid"]
        assert os.getsid(pid) == pid  # it does not end with our terminal
        assert vsockets.get_local_cid(context=vsockets.attach(folder / "2")) == 2
        for stream in (1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{stream}") == str(folder / "vsockd.log")
        control.stop()
    wait_until(lambda: has_gone(pid), "vsockd to exit")
    assert os.listdir(folder) == []


def test_in_the_background_its_log_is_rotated(folder: Path, tmp_path: Path) -> None:
    """The state folder usually is in memory.  After the rotation vsockd logs to a new file."""
    (tmp_path / "audit.toml").write_text("[audit]\nrate = 1000000\n")
    assert run_vsockd(folder, "--background", "--config", str(tmp_path)).returncode == 0
    with Control(folder) as control:
        pid = control.status()["pid"]
        guest = vsockets.Attachment(control.add_context(3)["folder"])
        control.add_context(4)
        denials = 0
        while not (folder / "vsockd.log.1").exists():
            assert ask_once(guest, connect(4, 5000)).status == errno.EHOSTUNREACH
            denials += 1
            assert denials < 2 * LOG_FILE_MAX_BYTES // 100
        ask_once(guest, connect(4, 5001))
        assert "to 4:5001: " in (folder / "vsockd.log").read_text()
        assert (
            LOG_FILE_MAX_BYTES
            <= (folder / "vsockd.log.1").stat().st_size
            < LOG_FILE_MAX_BYTES + 1000
        )
        for stream in (1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{stream}") == str(folder / "vsockd.log")
        control.stop()
    wait_until(lambda: has_gone(pid), "vsockd to exit")
    assert os.listdir(folder) == []


def test_in_the_background_it_detects_the_ends_of_streams(folder: Path) -> None:
    """The descriptors of such a vsockd were opened by a process that has exited."""
    assert run_vsockd(folder, "--background").returncode == 0
    context = vsockets.attach(folder / "2")
    with (
        Control(folder) as control,
        vsockets.create_server((2, 5000), context=context) as server,
        vsockets.socket(context=context) as successor,
    ):
        with vsockets.create_connection((2, 5000), context=context) as client:
            accepted, peer = server.accept()
            with accepted:
                states = [row["state"] for row in control.sockets()]
                assert sorted(states) == ["established", "established", "listening"]
            # Also when the accepting side was the first to close.
            assert [row["state"] for row in control.sockets()] == ["listening"]
            assert client.recv(1) == b""
        successor.bind(peer)
    assert (folder / "vsockd.log").read_text() == ""


# One vsockd per state folder


def test_a_second_one_is_refused_in_one_line(vsock_fabric: PrivateFabric) -> None:
    for arguments in ([], ["--background"]):
        second = run_vsockd(vsock_fabric.folder, *arguments)
        assert second.returncode == os.EX_TEMPFAIL == 75
        assert second.stdout == ""
        assert second.stderr == (
            f"vsockd: vsockd is already running in {vsock_fabric.folder} (pid {vsock_fabric.pid})\n"
        )
    assert_serves(vsock_fabric)


def test_of_many_started_at_once_one_runs(folder: Path) -> None:
    racers = [
        subprocess.Popen([*VSOCKD, "--dir", str(folder), "--background"], stderr=subprocess.DEVNULL)
        for _ in range(8)
    ]
    assert sorted(racer.wait(PATIENCE) for racer in racers) == [0] + [75] * 7
    with Control(folder) as control:
        assert control.contexts()[0]["cid"] == 2


# Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_no_file_remains(folder: Path, number: signal.Signals) -> None:
    ready, announce = os.pipe()
    process = subprocess.Popen(
        [*VSOCKD, "--dir", str(folder), "--ready-fd", str(announce)], pass_fds=[announce]
    )
    os.close(announce)
    assert os.read(ready, 64)
    os.close(ready)
    context = vsockets.attach(folder / "2")
    with (
        Control(folder) as control,
        vsockets.create_server((2, 5000), context=context) as server,
        vsockets.socket(context=context) as client,
        vsockets.socket(type=socket.SOCK_DGRAM, context=context) as datagrams,
    ):
        control.add_context(7)
        client.connect((2, 5000))
        datagrams.bind((2, 5000))
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
        assert os.listdir(folder) == []
        # What was established goes on without vsockd, and a listener is told.
        accepted, _ = server.accept()
        client.sendall(b"still here")
        assert accepted.recv(10) == b"still here"
        accepted.close()
        server.settimeout(PATIENCE)
        with pytest.raises(OSError, match="vsockd") as ended:
            server.accept()
        assert ended.value.errno == errno.ENETDOWN


def test_a_signal_right_after_it_is_ready() -> None:
    for _ in range(8):
        fabric = PrivateFabric()
        with fabric:
            fabric.stop()  # raises unless the status is 0 and the folder empty


def test_the_administrator_ends_it(folder: Path) -> None:
    assert run_vsockd(folder, "--background").returncode == 0
    with Control(folder) as control:
        pid = control.status()["pid"]
        control.stop()
    wait_until(lambda: has_gone(pid), "vsockd to exit")
    assert os.listdir(folder) == []
    with pytest.raises(OSError, match="vsockd is not running in") as refusal:
        Control(folder)
    assert refusal.value.errno == errno.ENODEV


def test_a_state_folder_that_is_removed_ends_it(folder: Path) -> None:
    """No program could find it, and its lock would protect nothing."""
    removed: list[Callable[[], object]] = [
        lambda: shutil.rmtree(folder, ignore_errors=True),  # vsockd removes its files meanwhile
        lambda: folder.rename(folder.with_name("moved")),
        lambda: (folder / "control").unlink(),
        lambda: (folder / "vsockd.lock").rename(folder / "lock"),
    ]
    for remove in removed:
        with PrivateFabric(folder) as fabric:
            fabric.expect_errors()
            guest = fabric.guest(7)
            with vsockets.create_server((2, 5000), context=fabric.host) as server:
                client = vsockets.create_connection((2, 5000), context=guest)
                accepted, _ = server.accept()
                remove()
                wait_until(lambda: has_gone(fabric.pid), "vsockd to end", PATIENCE)
                with client, accepted:  # as after any other end
                    client.sendall(b"still here")
                    assert accepted.recv(10) == b"still here"
            assert f"ending: {folder} was removed or replaced" in fabric.log
            with pytest.raises(FabricFailed, match="vsockd died with status 1"):
                fabric.stop()
        for left in (folder, folder.with_name("moved")):
            if left.exists():
                assert set(os.listdir(left)) <= {"lock"}
                shutil.rmtree(left)


def test_a_replaced_state_folder_belongs_to_the_next_vsockd(folder: Path) -> None:
    with PrivateFabric(folder) as first:
        first.expect_errors()
        first.guest(7)
        with paused(first.pid):
            folder.rename(folder.with_name("moved"))
            second = PrivateFabric(folder)
            second.start()
        wait_until(lambda: has_gone(first.pid), "vsockd to end", PATIENCE)
        second.guest(7)
        assert_serves(second)
        second.stop()
        with pytest.raises(FabricFailed):
            first.stop()


# Crashing


def test_after_a_crash_the_next_one_cleans_up(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(7)
    server = vsockets.create_server((2, 5000), context=vsock_fabric.host)
    datagrams = vsockets.socket(type=socket.SOCK_DGRAM, context=guest)
    datagrams.bind((7, 5000))
    with server, datagrams:
        vsock_fabric.kill()
        assert {"0", "2", "7", "control", "private", "vsockd.lock"} <= set(
            os.listdir(vsock_fabric.folder)
        )
        with pytest.raises(OSError, match="vsockd is not running"):
            vsockets.create_connection((2, 5000), context=guest)
        vsock_fabric.start()
        found = sorted(os.listdir(vsock_fabric.folder))
        assert found == ["0", "2", "control", "private", "vsockd.lock", "vsockd.start"]
        assert sorted(os.listdir(vsock_fabric.folder / "private")) == ["lives", "trash"]
        assert [row["cid"] for row in vsock_fabric.control.contexts()] == [2]
        # The old listener's port is free.
        vsockets.create_server((2, 5000), context=vsock_fabric.host).close()


def test_cleaning_up_removes_only_what_vsockd_makes(folder: Path) -> None:
    folder.mkdir()
    mine = [folder / name for name in ("notes", "1", "03", "self")]
    for path in mine:
        path.write_text("mine")
    with PrivateFabric(folder) as fabric:
        assert_serves(fabric)
        for path in mine:
            assert path.read_text() == "mine"
            path.unlink()


# On demand


def start_on_demand(folder: Path, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "VSOCKETS_DIR": str(folder), **more}
    return subprocess.Popen(
        [sys.executable, "-c", "import vsockets; print(vsockets.get_local_cid())"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_library_starts_a_missing_vsockd(folder: Path) -> None:
    program = start_on_demand(folder)
    assert program.communicate(timeout=PATIENCE) == ("2\n", "")
    with Control(folder) as control:  # and it stays
        assert control.status()["contexts"] == 1


def test_the_library_starts_one_after_a_crash(folder: Path) -> None:
    """Unless it was started in another way: see test_crash_records."""
    for _ in range(2):
        program = start_on_demand(folder)
        assert program.communicate(timeout=PATIENCE) == ("2\n", "")
        with Control(folder) as control:
            pid, first = control.status()["pid"], main_process(control)
        os.kill(first, signal.SIGKILL)
        wait_until(partial(has_gone, pid), "vsockd to exit")
        assert (folder / "2" / "stream").exists()


def test_programs_that_race_to_start_vsockd_share_one(folder: Path) -> None:
    for _ in range(3):
        programs = [start_on_demand(folder) for _ in range(5)]
        said = [program.communicate(timeout=20) for program in programs]
        assert said == [("2\n", "")] * 5
        with Control(folder) as control:
            control.stop()
            wait_until(lambda: not folder.exists() or not os.listdir(folder))


ANNOUNCE_STATUS = """
import subprocess, vsockets

def run(*arguments, original=subprocess.run, **named):
    finished = original(*arguments, **named)
    print(finished.returncode, flush=True)
    return finished

subprocess.run = run
print(vsockets.get_local_cid())
"""


def test_a_program_waits_for_the_vsockd_that_won_the_race(folder: Path) -> None:
    """The loser of the race finds the folder locked, but possibly no control socket yet."""
    folder.mkdir(mode=0o700)
    lock = os.open(folder / "vsockd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a vsockd does before anything else
    environment = {**os.environ, "VSOCKETS_DIR": str(folder)}
    loser = subprocess.Popen(
        [sys.executable, "-c", ANNOUNCE_STATUS],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert loser.stdout is not None
    assert loser.stdout.readline() == "75\n"
    os.close(lock)
    assert start_on_demand(folder).communicate(timeout=PATIENCE) == ("2\n", "")
    said, complaint = loser.communicate(timeout=PATIENCE)
    assert said.splitlines()[-1:] == ["2"], complaint


def test_the_library_does_not_report_its_program_as_ready(folder: Path) -> None:
    """Only the program knows when it is ready; a vsockd it happens to start does not."""
    name = f"{folder}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(name)
        program = start_on_demand(folder, NOTIFY_SOCKET=name)
        assert program.communicate(timeout=PATIENCE) == ("2\n", "")
        with pytest.raises(BlockingIOError):
            manager.recv(100)


# Folders


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_others_can_write_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    finished = run_vsockd(folder)
    assert finished.returncode == 1
    assert finished.stderr == (
        f"vsockd: cannot start in {folder}: "
        f"{folder}: not used, because other users can write to it (chmod go-w {folder})\n"
    )
    assert os.listdir(folder) == []
    program = start_on_demand(folder)
    assert "other users can write to it" in program.communicate(timeout=PATIENCE)[1]


def test_a_link_is_refused(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    finished = run_vsockd(folder)
    assert finished.returncode == 1
    assert "it is not a folder of user" in finished.stderr
    assert os.listdir(elsewhere) == []


@as_root
def test_another_users_folder_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    finished = run_vsockd(folder)
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert "it is not a folder of user 0" in finished.stderr
    assert os.listdir(folder) == []


def test_a_file_is_refused(folder: Path) -> None:
    folder.write_text("")
    finished = run_vsockd(folder)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"vsockd: cannot start in {folder}: ")
    assert finished.stderr.count("\n") == 1


def test_missing_folders_above_are_made(folder: Path) -> None:
    with PrivateFabric(folder / "a" / "b") as fabric:
        assert_serves(fabric)


def test_a_path_too_long_for_a_socket_works(folder: Path) -> None:
    deep = folder.joinpath(*["a-folder-with-a-long-name"] * 6)
    assert len(os.fspath(deep)) > 107
    with PrivateFabric(deep) as fabric:
        guest = fabric.guest()
        with vsockets.create_server((2, 5000), context=fabric.host) as server:
            client = vsockets.create_connection((2, 5000), context=guest)
            accepted, _ = server.accept()
            with client, accepted:
                client.sendall(b"far away")
                assert accepted.recv(8) == b"far away"
        with (
            vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as receiver,
            vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sender,
        ):
            receiver.bind((2, 5000))
            sender.sendto(b"far away", (2, 5000))
            assert receiver.recvfrom(8) == (b"far away", sender.getsockname())
        program = start_on_demand(deep)
        assert program.communicate(timeout=PATIENCE) == ("2\n", "")
