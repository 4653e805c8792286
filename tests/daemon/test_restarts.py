"""vsockd is killed by SIGKILL, and started again by its holder: no program notices."""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets import Attachment
from vsockets.control import Control
from vsockets.daemon.journal import JournalDamaged, Log, read_entries
from vsockets.protocol import Record, Role
from vsockets.state_folder import LOCK
from vsockets.testing import FabricFailed, PrivateFabric, wait_until

from .continuity import (
    PATIENCE,
    check_byte_counts,
    check_datagram_sockets_and_routes,
    check_streams_listeners_and_ports,
    datagram,
)
from .test_device_link import SIZES, Device
from .users import NOBODY, as_nobody

#: So often vsockd is killed while programs use it.
_KILLS = 12


@pytest.fixture
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric(restarts=1000) as fabric:
        fabric.expect_errors()  # vsockd logs that it was killed
        yield fabric


@pytest.fixture
def guest(fabric: PrivateFabric) -> Attachment:
    return fabric.guest()


def kill(fabric: PrivateFabric) -> None:
    """Kill vsockd, and wait until another one serves."""
    pid = kill_at_once(fabric)
    wait_until(lambda: fabric.control.status()["pid"] != pid, "vsockd to be started again")


def kill_at_once(fabric: PrivateFabric) -> int:
    pid = int((fabric.folder / LOCK).read_text())
    with contextlib.suppress(ProcessLookupError):  # it was killed, and the next one starts
        os.kill(pid, signal.SIGKILL)
    return pid


def test_streams_listeners_and_ports_stay(fabric: PrivateFabric) -> None:
    check_streams_listeners_and_ports(fabric, lambda: kill(fabric), "descriptors")


def test_datagram_sockets_and_their_routes_stay(fabric: PrivateFabric) -> None:
    check_datagram_sockets_and_routes(fabric, lambda: kill(fabric))


def test_byte_counts_stay(fabric: PrivateFabric) -> None:
    check_byte_counts(fabric, lambda: kill(fabric))


def test_streams_that_ended_before_have_ended(fabric: PrivateFabric, guest: Attachment) -> None:
    """The next vsockd has no record of them, and lets their ports be bound."""
    for _ in range(3):
        with vsockets.create_server((2, 5000), context=fabric.host) as server:
            client = vsockets.create_connection((2, 5000), context=guest)
            port = client.getsockname()[1]
            client.close()
            server.accept()[0].close()
        wait_until(lambda: not fabric.control.sockets(), "vsockd to notice the end")
        kill(fabric)
        assert fabric.control.sockets() == []
        vsockets.create_server((guest.cid, port), context=guest).close()


def test_killed_after_it_was_replaced(fabric: PrivateFabric) -> None:
    """The journal of a successor begins with parts, written while its predecessor served."""

    def change() -> None:
        fabric.control.replace()
        kill(fabric)

    check_streams_listeners_and_ports(fabric, change, "descriptors", "holder")
    check_datagram_sockets_and_routes(fabric, change)


def test_a_supervised_server_stays(fabric: PrivateFabric, guest: Attachment) -> None:
    program = """
import socket, sys
server = socket.socket(40)
server.bind((0xFFFFFFFF, 5000)); server.listen()
print("serves", flush=True)
for _ in range(2):
    connection, (cid, port) = server.accept()
    connection.sendall(connection.recv(10) + b" %d" % cid)
"""
    command = [sys.executable, "-c", program]
    with fabric.popen(guest, command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serves\n"
        for _ in range(2):
            kill(fabric)
            with vsockets.create_connection((guest.cid, 5000), context=fabric.host) as client:
                client.send(b"for")
                assert client.recv(10) == b"for 2"
        assert process.wait(PATIENCE) == 0
    assert fabric.control.sockets() == []


def test_guests_leases_and_states_stay(fabric: PrivateFabric) -> None:
    with Control(fabric.folder) as other:
        leased = other.add_context(lease=True)["cid"]
        suspended = fabric.control.add_context(name="sleeper", profile="restricted")["cid"]
        tolerant = fabric.control.add_context(limits={"sockets": 7})["cid"]
        off = fabric.control.add_context(powered=False)["cid"]
        fabric.control.suspend(suspended)
        fabric.control.fault_tolerance(tolerant, True)
        removed = fabric.control.add_context()["cid"]
        fabric.control.remove_context(removed)
        before = fabric.control.contexts()
        kill(fabric)
        assert fabric.control.contexts() == before
        fabric.control.resume(suspended)
        fabric.control.power_on(off)
        assert fabric.control.add_context()["cid"] > removed  # no CID is reused soon
        kill(fabric)
        assert leased in {one["cid"] for one in fabric.control.contexts()}
    wait_until(
        lambda: leased not in {one["cid"] for one in fabric.control.contexts()},
        "the end of the lease",
    )


def test_the_settings_stay_when_the_configuration_has_become_invalid(
    fabric: PrivateFabric,
) -> None:
    file = fabric.configuration / "limits.toml"
    file.write_text("[limits]\nsockets = 3\n")
    fabric.control.reload()
    file.write_text("[limits\n")
    kill(fabric)
    assert fabric.control.add_context()["limits"]["sockets"] == 3


def test_refusals_and_denials_stay_counted(fabric: PrivateFabric, guest: Attachment) -> None:
    other = fabric.guest()
    for _ in range(2):
        for cid, code in ((2, errno.ECONNRESET), (other.cid, errno.EHOSTUNREACH)):
            with pytest.raises(OSError) as refused:
                vsockets.create_connection((cid, 5000), context=guest)
            assert refused.value.errno == code
        before = fabric.control.counts()
        (row,) = [one for one in before["contexts"] if one["cid"] == guest.cid]
        assert row["refusals"] > 0 and sum(row["denials"].values()) > 0
        kill(fabric)
        assert fabric.control.counts() == before


def test_followers_of_events_see_one_event(fabric: PrivateFabric) -> None:
    with fabric.control.events("context", "vsockd") as events:
        first = fabric.control.add_context()["cid"]
        kill(fabric)
        second = fabric.control.add_context()["cid"]
        seen = [events.wait(PATIENCE) for _ in range(3)]
    assert [one.get("cid") for one in seen] == [first, None, second]
    assert seen[1]["topic"] == "vsockd" and seen[1]["change"] == "restarted"


def test_a_device_stays_attached(fabric: PrivateFabric, guest: Attachment) -> None:
    device = Device(fabric, guest)
    with device.link, vsockets.socket(context=fabric.host) as client:
        kill(fabric)
        client.setblocking(False)
        client.connect_ex((guest.cid, 5000))
        offer, stream = device.offer()
        with stream:
            kill(fabric)
            record = Record(0, 0, *offer.peer, *offer.local, Role.CONNECTED, 1, 2, 3, *SIZES)
            stream.send(record.encode())
            stream.recv(3072)
            device.settle(offer)
            wait_until(lambda: connects(fabric) == 1, "the connection")
            client.settimeout(PATIENCE)
            stream.send(b"x")
            assert client.recv(1) == b"x"


def test_hybrid_sockets_and_relays_stay(fabric: PrivateFabric) -> None:
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        path = Path(enter(tempfile.TemporaryDirectory(prefix="hybrid-", dir="/tmp")), "v.sock")
        guest = fabric.guest(7, hybrid=path)
        server = enter(vsockets.create_server((7, 5000), context=guest))
        service = enter(socket.socket(socket.AF_UNIX))
        service.bind(f"{path}_1024")
        service.listen()
        inward, half = (enter(socket.socket(socket.AF_UNIX)) for _ in range(2))
        for one in (inward, half):
            one.connect(str(path))
        inward.send(b"CONNECT 5000\n")
        accepted = enter(server.accept()[0])
        assert inward.recv(100).startswith(b"OK ")
        outward = enter(vsockets.create_connection((2, 1024), context=guest))
        relayed = enter(service.accept()[0])
        half.send(b"CONNE")
        for _ in range(2):
            kill(fabric)
            for client, server_end in ((inward, accepted), (outward, relayed)):
                client.send(b"data")
                assert server_end.recv(100) == b"data"
        half.send(b"CT 5000\nearly")
        late = enter(server.accept()[0])
        assert half.recv(100).startswith(b"OK ") and late.recv(100) == b"early"
        enter(vsockets.create_connection((2, 1024), context=guest))
        enter(service.accept()[0]).send(b"answer")


def connects(fabric: PrivateFabric) -> int:
    (host,) = [one for one in fabric.control.counts()["contexts"] if one["cid"] == 2]
    number: int = host["connects"]
    return number


# Under load


class Load:
    """Threads that repeat operations until :meth:`end`, and the problems that they had."""

    def __init__(self, *operations: Callable[[], None]) -> None:
        self._ended = threading.Event()
        self.problems: list[str] = []
        self.done = 0
        self._threads = [threading.Thread(target=self._repeat, args=(one,)) for one in operations]
        for thread in self._threads:
            thread.start()

    def _repeat(self, operation: Callable[[], None]) -> None:
        while not self._ended.is_set():
            try:
                operation()
            except BaseException as error:
                self.problems.append(f"{operation.__name__}: {error!r}")
                return
            self.done += 1

    def await_requests(self) -> None:
        """Wait until requests were served, or one has failed."""
        served = self.done + 8  # more than those that were under way
        wait_until(lambda: self.problems or self.done > served, "requests")

    def end(self) -> None:
        """Wait for the threads to end."""
        self._ended.set()
        for thread in self._threads:
            thread.join()


def echo(server: vsockets.socket) -> None:
    """Send back what the clients of ``server`` send, until the server is closed."""
    while True:
        try:
            stream, _ = server.accept()
        except OSError:
            return
        with stream, contextlib.suppress(OSError):
            while data := stream.recv(4096):
                stream.sendall(data)


def exchange(stream: vsockets.socket) -> None:
    data = os.urandom(16)
    stream.settimeout(PATIENCE)
    stream.sendall(data)
    assert stream.recv(100) == data


def test_no_request_is_lost_or_done_twice(fabric: PrivateFabric) -> None:
    limits = {"sockets": 100_000, "request_rate": 1_000_000, "pending_connects": 10_000}
    guest = fabric.guest(limits=limits)
    server = vsockets.create_server((2, 5000), context=fabric.host, backlog=100)
    threading.Thread(target=echo, args=(server,)).start()

    def connect() -> None:
        with vsockets.create_connection((2, 5000), context=guest) as stream:
            exchange(stream)

    def bind() -> None:
        with vsockets.create_server((guest.cid, 6000), context=guest) as own:
            assert own.getsockname() == (guest.cid, 6000)
            with vsockets.create_connection((guest.cid, 6000), context=fabric.host) as stream:
                own.settimeout(PATIENCE)
                with own.accept()[0] as accepted:
                    accepted.send(b"hi")
                    assert stream.recv(10) == b"hi"

    def send() -> None:
        with datagram(guest, (guest.cid, 6001)) as one, datagram(guest, (guest.cid, 6002)) as two:
            one.sendto(b"hello", (guest.cid, 6002))
            assert two.recvfrom(10) == (b"hello", (guest.cid, 6001))

    def administrate() -> None:
        with Control(fabric.folder) as control:
            cid = control.add_context(lease=True)["cid"]
            control.suspend(cid)
            assert [one["state"] for one in control.contexts() if one["cid"] == cid] == [
                "suspended"
            ]

    load = Load(connect, bind, send, administrate)
    for _ in range(_KILLS):
        load.await_requests()
        time.sleep(random.random() / 20)
        kill_at_once(fabric)
    load.end()
    server.close()
    with contextlib.suppress(OSError):  # the thread waits for another connection
        vsockets.create_connection((2, 5000), context=guest).close()
    assert not load.problems
    wait_until(lambda: not fabric.control.sockets(), "all sockets to be released")
    wait_until(lambda: len(fabric.control.contexts()) == 2, "leases to end")


def test_killed_while_it_starts_again(fabric: PrivateFabric, guest: Attachment) -> None:
    with vsockets.create_server((2, 5000), context=fabric.host) as server:
        holder = fabric.control.status()["holder"]
        for _ in range(10):
            for pid in children(holder):
                with contextlib.suppress(ProcessLookupError):  # ended since it was listed
                    os.kill(pid, signal.SIGKILL)
            time.sleep(random.random() / 50)
        connect_once(server, guest)


def connect_once(server: vsockets.socket, guest: Attachment) -> None:
    with vsockets.create_connection((2, 5000), context=guest) as client, server.accept()[0] as peer:
        client.send(b"x")
        assert peer.recv(1) == b"x"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_while_it_is_replaced(fabric: PrivateFabric, guest: Attachment) -> None:
    """Either the old one serves, started again, or the new one."""
    with vsockets.create_server((2, 5000), context=fabric.host) as server:
        for _ in range(3):
            pid = int((fabric.folder / LOCK).read_text())
            replacing = threading.Thread(target=replace, args=(fabric.folder,))
            replacing.start()
            time.sleep(random.random() / 3)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            connect_once(server, guest)
            replacing.join()


def replace(folder: Path) -> None:
    with contextlib.suppress(OSError), Control(folder) as control:
        control.replace()


# Limits


def test_it_is_not_started_again_for_ever() -> None:
    fabric = PrivateFabric(restarts=2)
    fabric.expect_errors()
    with fabric, pytest.raises(FabricFailed, match="status 137"):
        for _ in range(2):
            kill(fabric)
        kill_at_once(fabric)
        process = vars(fabric)["_process"]
        assert process.wait(PATIENCE) == 128 + signal.SIGKILL
        assert "vsockd was ended by SIGKILL again: it is not restarted" in fabric.log
        fabric.stop()
    fabric.kill()


def test_it_ends_with_its_holder(fabric: PrivateFabric) -> None:
    pid = fabric.control.status()["pid"]
    fabric.kill()  # the process that was started: the holder
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "vsockd to end")
    fabric.start()


def test_a_replaced_vsockd_is_started_again(fabric: PrivateFabric, guest: Attachment) -> None:
    with vsockets.create_server((2, 5000), context=fabric.host):
        fabric.control.replace()
        kill(fabric)
        vsockets.create_connection((2, 5000), context=guest).close()
        fabric.control.replace()
        fabric.control.replace()
        kill(fabric)
        vsockets.create_connection((2, 5000), context=guest).close()


def test_without_a_holder_there_is_a_warning() -> None:
    """The user may start no further process; vsockd serves all the same."""
    program = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0)); "
        "os.execv(sys.executable, [sys.executable, '-m', 'vsockets.daemon', *sys.argv[1:]])"
    )
    with tempfile.TemporaryDirectory(prefix="vr-", dir="/tmp") as scratch:
        if os.geteuid() == 0:
            os.chown(scratch, NOBODY, NOBODY)
        reader, writer = os.pipe()
        folder, log = Path(scratch, "fabric"), Path(scratch, "log")
        command = as_nobody(sys.executable, "-c", program, "--dir", str(folder))
        command += ["--config", str(Path(scratch, "none")), "--ready-fd", str(writer)]
        command += ["--restarts", "5"]
        source = str(Path(vsockets.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": source}
        with open(log, "wb") as file, open(reader, "rb") as ready:
            process = subprocess.Popen(command, env=environment, stderr=file, pass_fds=[writer])
            os.close(writer)
            assert ready.read(1), log.read_text()
        with Control(folder) as control:
            assert control.status()["holder"] is None
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert "WARNING: vsockd is not started again if it is killed: " in log.read_text()


# The journal


def test_a_changed_byte_of_the_journal_is_found() -> None:
    log = Log(100)
    for content in (1, 2):
        log.append(marshal.dumps(([content], None, 0)))
        log.include()
    assert [entry[0] for entry in read_entries(log.fd)] == [[1], [2]]
    for at in range(log.end):
        (before,) = os.pread(log.fd, 1, at)
        for bit in range(8):
            os.pwrite(log.fd, bytes([before ^ 1 << bit]), at)
            with pytest.raises(JournalDamaged):
                list(read_entries(log.fd))
        os.pwrite(log.fd, bytes([before]), at)
    assert len(list(read_entries(log.fd))) == 2
    log.close()


def test_an_entry_that_is_not_complete_does_not_count() -> None:
    log = Log(10)
    log.append(marshal.dumps(([1], None, 0)))
    log.include()
    log.append(marshal.dumps((["x" * 1000], None, 0)))  # makes the file grow
    assert [entry[0] for entry in read_entries(log.fd)] == [[1]]
    log.close()


def test_vsockd_does_not_start_with_a_damaged_journal() -> None:
    fabric = PrivateFabric(restarts=5)
    fabric.expect_errors()
    with fabric, pytest.raises(FabricFailed, match="status 1"):
        pid = fabric.control.status()["pid"]
        files = Path(f"/proc/{pid}/fd").iterdir()
        journal = next(one for one in files if "vsockd-journal" in os.readlink(one))
        with open(journal, "r+b") as content:
            content.seek(100)
            content.write(b"damaged")
        kill_at_once(fabric)
        assert vars(fabric)["_process"].wait(PATIENCE) == 1
        assert "vsockd: the journal is damaged: the entry at 16 has a wrong length" in fabric.log
        assert "start it again (vsock up)" in fabric.log
        fabric.stop()
    fabric.kill()
