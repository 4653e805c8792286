"""``vsock up --replace``: another process takes over everything, and no program notices."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets._linux.inspection import unread_bytes
from vsockets.control import Control
from vsockets.daemon import succession
from vsockets.protocol import RECORD_SIZE, Op, Record, Request
from vsockets.protocol.client import local_cid
from vsockets.state_folder import LOCK
from vsockets.testing import FabricFailed, PrivateFabric, wait_until

from .continuity import (
    PATIENCE,
    check_byte_counts,
    check_datagram_sockets_and_routes,
    check_streams_listeners_and_ports,
    datagram,
)
from .raw_client import SIZES, ask, descriptors, enter
from .test_device_link import Device
from .test_named_sockets import SECRET, Holder


@pytest.fixture
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture
def guest(fabric: PrivateFabric) -> Attachment:
    return fabric.guest()


def test_streams_listeners_and_ports_stay(fabric: PrivateFabric) -> None:
    replaced: list[int] = []
    check_streams_listeners_and_ports(fabric, lambda: replaced.append(fabric.control.replace()))
    assert replaced == [fabric.control.status()["pid"]]


def test_datagram_sockets_and_their_routes_stay(fabric: PrivateFabric) -> None:
    check_datagram_sockets_and_routes(fabric, fabric.control.replace)


def test_byte_counts_stay(fabric: PrivateFabric) -> None:
    check_byte_counts(fabric, fabric.control.replace)


def test_routes_are_still_revoked(fabric: PrivateFabric, guest: Attachment) -> None:
    """A program that keeps a route cannot send in the name of the port's next owner."""
    with datagram(fabric.host, (2, 6000)) as service:
        with datagram(guest, (guest.cid, 6001)) as client:
            client.sendto(b"before", (2, 6000))
            route = next(iter(vars(client)["_routes"].values())).dup()
            service.recv(10)
            fabric.control.replace()
        with route, datagram(guest, (guest.cid, 6001)), pytest.raises(BrokenPipeError):
            route.send(b"in another's name")


def test_unread_datagrams_of_a_revoked_route_are_counted(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    with datagram(fabric.host, (2, 6000)) as service:
        with datagram(guest, (guest.cid, 6001)) as client:
            client.sendto(bytes(1000), (2, 6000))
        datagram(guest, (guest.cid, 6001)).close()  # revokes the route
        unread = usage(fabric, guest)["datagram_bytes"]
        assert unread >= 1000
        fabric.control.replace()
        assert usage(fabric, guest)["datagram_bytes"] == unread
        service.recv(1000)
        assert usage(fabric, guest)["datagram_bytes"] == 0


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
            fabric.control.replace()
            with vsockets.create_connection((guest.cid, 5000), context=fabric.host) as client:
                client.send(b"for")
                assert client.recv(10) == b"for 2"
        assert process.wait(PATIENCE) == 0
    assert fabric.control.sockets() == []  # finds the closed ones, once


def test_a_stream_of_a_supervised_server_outlives_its_listener(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    program = """
import socket
with socket.socket(40) as server:
    server.bind((0xFFFFFFFF, 5000)); server.listen()
    print("serves", flush=True)
    connection, _ = server.accept()
print("closed", flush=True)
connection.sendall(connection.recv(10))
"""
    command = [sys.executable, "-c", program]
    with fabric.popen(guest, command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"serves\n"
        with vsockets.create_connection((guest.cid, 5000), context=fabric.host) as client:
            assert process.stdout.readline() == b"closed\n"
            before = fabric.control.sockets()  # vsockd finds the listener closed
            fabric.control.replace()
            assert fabric.control.sockets() == before
            client.send(b"still")
            assert client.recv(10) == b"still"
        assert process.wait(PATIENCE) == 0


def test_a_port_stays_that_a_refused_connect_has_taken_from_its_holder(
    fabric: PrivateFabric,
) -> None:
    holder = Holder(fabric.host, 6000)
    with enter(fabric.host) as sock:
        connect = Request(Op.CONNECT, 0, 0, 0, 2, 9, 0, *SIZES, 0, SECRET)
        assert ask(sock, connect).status == errno.ECONNRESET
        holder.close()
        before = fabric.control.sockets()
        fabric.control.replace()
        assert fabric.control.sockets() == before
        assert [(row["port"], row["state"]) for row in before] == [(6000, "bound")]


def test_pending_connections_of_a_supervised_server_are_counted(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    """Pending connections are released as the program accepts, whichever vsockd announced them."""
    program = """
import socket
server = socket.socket(40)
server.bind((2, 5000)); server.listen()
print("serves", flush=True)
input()
for _ in range(3): server.accept()
print("accepted", flush=True)
input()
"""
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with fabric.popen(fabric.host, command, **pipes) as process, contextlib.ExitStack() as stack:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"serves\n"
        for _ in range(3):
            stack.enter_context(vsockets.create_connection((2, 5000), context=guest))
        assert usage(fabric, guest)["pending_connects"] == 3
        fabric.control.replace()
        assert usage(fabric, guest)["pending_connects"] == 3
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"accepted\n"
        assert usage(fabric, guest)["pending_connects"] == 0
        process.stdin.write(b"\n")


def test_a_supervised_socket_connects_from_its_port(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    program = """
import socket
sock = socket.socket(40)
sock.bind((0xFFFFFFFF, 7000))
print("bound", flush=True)
input()
sock.connect((2, 5000))
"""
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        fabric.popen(guest, command, **pipes) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"bound\n"
        fabric.control.replace()
        process.stdin.write(b"\n")
        process.stdin.close()
        server.settimeout(PATIENCE)
        accepted, peer = server.accept()
        accepted.close()
        assert peer == (guest.cid, 7000)
        assert process.wait(PATIENCE) == 0


def test_an_accepted_stream_is_recognised(fabric: PrivateFabric, guest: Attachment) -> None:
    """A supervised program inherits it; vsockd knows the stream by its inode."""
    program = "import socket, sys; print(socket.socket(fileno=int(sys.argv[1])).getpeername())"
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        vsockets.create_connection((2, 5000), context=guest) as client,
        server.accept()[0] as accepted,
    ):
        fabric.control.sockets()  # reads the inodes
        fabric.control.replace()
        number = accepted.fileno()
        command = [sys.executable, "-c", program, str(number)]
        done = fabric.run(fabric.host, command, pass_fds=[number], stdout=subprocess.PIPE)
        assert done.stdout.decode() == f"{client.getsockname()}\n"


def test_a_stream_that_could_not_be_ended_yet_is_ended(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    """Both its ends are in messages between processes, where vsockd cannot find them."""
    hiding, hidden = socket.socketpair()
    with hiding, hidden, vsockets.create_server((2, 5000), context=fabric.host) as server:
        client = vsockets.create_connection((2, 5000), context=guest)
        accepted, _ = server.accept()
        for end in (client, accepted):
            socket.send_fds(hiding, [b"x"], [end.fileno()])
            end.close()
        (left,) = fabric.control.suspend(guest.cid)["streams_left"]
        assert tuple(left["peer"]) == (2, 5000)
        fabric.control.replace()
        for _ in range(2):
            _, (number,), _, _ = socket.recv_fds(hidden, 1, 1)
            with socket.socket(fileno=number) as received:
                received.settimeout(PATIENCE)
                assert received.recv(1) == b""


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
        fabric.control.replace()
        assert fabric.control.contexts() == before
        assert {leased, suspended, tolerant, off} < {one["cid"] for one in before}
        fabric.control.resume(suspended)
        fabric.control.power_on(off)
        later = fabric.control.add_context()["cid"]
        assert later > removed  # no CID is reused soon
    wait_until(lambda: leased not in cids(fabric), "the end of the lease")


def cids(fabric: PrivateFabric) -> set[int]:
    return {one["cid"] for one in fabric.control.contexts()}


def test_limits_count_what_was_there_before(fabric: PrivateFabric) -> None:
    guest = fabric.guest(limits={"sockets": 3})
    held = [vsockets.create_server((guest.cid, 5000 + n), context=guest) for n in range(3)]
    fabric.control.replace()
    with pytest.raises(OSError) as refused:
        vsockets.create_server((guest.cid, 6000), context=guest)
    assert refused.value.errno == errno.ENOBUFS
    held.pop().close()
    wait_until(lambda: binds(guest), "the closed socket to be released")
    for sock in held:
        sock.close()


def binds(guest: Attachment) -> bool:
    try:
        vsockets.create_server((guest.cid, 6000), context=guest).close()
    except OSError:
        return False
    return True


def test_followers_of_events_see_one_event(fabric: PrivateFabric) -> None:
    with fabric.control.events("context", "vsockd") as events:
        first = fabric.control.add_context()["cid"]
        pid = fabric.control.replace()
        second = fabric.control.add_context()["cid"]
        seen = [events.wait(PATIENCE) for _ in range(3)]
    assert [one.get("cid") for one in seen] == [first, None, second]
    assert seen[1]["topic"] == "vsockd" and seen[1]["change"] == "replaced"
    assert seen[1]["pid"] == pid and [one["missed"] for one in seen] == [0, 0, 0]


def test_events_that_were_not_read_in_time_are_counted(fabric: PrivateFabric) -> None:
    with fabric.control.events("context", "vsockd") as events:
        for _ in range(1000):
            fabric.control.remove_context(fabric.control.add_context()["cid"])
        fabric.control.replace()
        read = 0
        while taken := events.take():
            read += len(taken)
        assert 0 < read < 2000
        fabric.control.add_context()
        assert events.wait(PATIENCE)["missed"] == 2001 - read


def test_a_client_without_a_request_yet_is_served(fabric: PrivateFabric, guest: Attachment) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(fabric.folder / str(guest.cid) / "stream"))
        wait_until(lambda: pending(fabric, guest) == 1, "vsockd to accept it")
        fabric.control.replace()
        assert pending(fabric, guest) == 1
        silent.send(local_cid())
        silent.settimeout(PATIENCE)
        assert Record.decode(silent.recv(RECORD_SIZE)).local_cid == guest.cid


def pending(fabric: PrivateFabric, guest: Attachment) -> int:
    return usage(fabric, guest)["pending_connects"]


def usage(fabric: PrivateFabric, guest: Attachment) -> dict[str, int]:
    rows = {row["cid"]: row for row in fabric.control.contexts()}
    found: dict[str, int] = rows[guest.cid]["usage"]
    return found


def test_a_device_stays_attached(fabric: PrivateFabric, guest: Attachment) -> None:
    device = Device(fabric, guest)
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel = device.hand_over(socket.SOCK_SEQPACKET)
    socket.send_fds(channel, [Request(Op.CATCH_ALL).encode()], [datagrams.fileno()])
    assert Record.decode(channel.recv(RECORD_SIZE)).status == 0
    channel.close()
    with (
        datagrams,
        vsockets.socket(context=fabric.host) as polling,
        contextlib.closing(device.link),
    ):
        polling.setblocking(False)
        with pytest.raises(BlockingIOError):
            polling.connect((guest.cid, 700))
        offer, stream = device.offer()
        refused = vsockets.socket(context=fabric.host)
        refused.setblocking(False)
        with pytest.raises(BlockingIOError):
            refused.connect((guest.cid, 701))

        fabric.control.replace()

        with stream:
            stream.send(Record(0, 0, *offer.peer, *offer.local, 4, 1, 2, 3).encode())
            stream.recv(3072)
            device.settle(offer)
            device.refuse()
            wait_until(lambda: streams(fabric) == [(guest.cid, 700)], "the outcomes")
        refused.close()
        with datagram(fabric.host, (2, 6000)) as sender:
            sender.sendto(b"to the guest", (guest.cid, 9))
        datagrams.settimeout(PATIENCE)
        assert datagrams.recv(20) == b"to the guest"
        with pytest.raises(OSError) as busy:
            fabric.control.attach_device(guest.cid)
        assert busy.value.errno == errno.EBUSY
        with (
            vsockets.create_server((2, 5000), context=fabric.host) as server,
            device.connect(702, 2, 5000) as sock,
        ):
            assert Record.decode(sock.recv(RECORD_SIZE)).status == 0
            server.accept()[0].close()


def test_a_socket_that_a_detached_device_refused_is_handed_over_again(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    device = Device(fabric, guest)
    with vsockets.socket(context=fabric.host) as sock:
        sock.bind((2, 6000))
        sock.setblocking(False)
        assert sock.connect_ex((guest.cid, 80)) == errno.EINPROGRESS
        device.refuse()
        assert select.select([], [sock], [], PATIENCE)[1]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        wait_until(lambda: streams(fabric) == [], "vsockd to read the report")
        device.link.close()
        first, second = fabric.control.replace(), fabric.control.replace()
        assert first != second == fabric.control.status()["pid"]
        assert [(row["port"], row["state"]) for row in fabric.control.sockets()] == [
            (6000, "bound")
        ]


def streams(fabric: PrivateFabric) -> list[tuple[int, int]]:
    """Return the addresses of the guests' ends."""
    rows = fabric.control.sockets()
    found = [row for row in rows if row["state"] == "established" and row["cid"] != 2]
    return [(row["cid"], row["port"]) for row in found]


def test_hybrid_vsock_stays(fabric: PrivateFabric) -> None:
    with tempfile.TemporaryDirectory(prefix="hybrid-", dir="/tmp") as folder:
        path = Path(folder, "v.sock")
        guest = fabric.guest(7, hybrid=path)
        with (
            vsockets.create_server((7, 5000), context=guest) as agent,
            socket.socket(socket.AF_UNIX) as tool,
            socket.socket(socket.AF_UNIX) as service,
        ):
            service.bind(f"{path}_1024")
            service.listen()
            first = vsockets.create_connection((2, 1024), context=guest)  # starts the relay
            accepted, _ = service.accept()
            tool.settimeout(PATIENCE)
            tool.connect(str(path))
            tool.send(b"CONNECT 5")
            wait_until(lambda: unread(tool) == 0, "vsockd to read the beginning")
            relay = relays(fabric)

            fabric.control.replace()

            tool.send(b"000\n")
            assert tool.recv(3) == b"OK "
            agent.accept()[0].close()
            first.send(b"x")
            assert accepted.recv(1) == b"x"
            with vsockets.create_connection((2, 1024), context=guest):
                service.accept()[0].close()
                assert relays(fabric) == relay  # the same one serves
            accepted.close()
            first.close()
        fabric.control.remove_context(7)
        wait_until(lambda: not path.exists(), "the socket to be removed")


def relays(fabric: PrivateFabric) -> set[int]:
    """Return the processes at the host's ends of streams to its port 1024."""
    return {
        row["pid"] for row in fabric.control.sockets() if (row["cid"], row["port"]) == (2, 1024)
    }


def unread(sock: socket.socket) -> int:
    return unread_bytes(sock.fileno())


def test_nothing_is_left_behind(fabric: PrivateFabric, guest: Attachment) -> None:
    with vsockets.create_server((2, 5000), context=fabric.host) as server:
        first = fabric.control.replace()
        fabric.control.status()  # then it serves
        before = descriptors(first)
        for _ in range(5):
            with vsockets.create_connection((2, 5000), context=guest):
                server.accept()[0].close()
            last = fabric.control.replace()
        wait_until(lambda: descriptors(last) == before, f"{before} descriptors")
        assert not Path(f"/proc/{first}").exists()


def test_a_successor_that_fails_changes_nothing(fabric: PrivateFabric, guest: Attachment) -> None:
    broken = Path(fabric.control.status()["configuration"], "broken.toml")
    broken.parent.mkdir(exist_ok=True)
    with vsockets.create_server((2, 5000), context=fabric.host):
        before = fabric.control.status()["pid"]
        broken.write_text("nonsense = 1\n")
        with pytest.raises(OSError, match="vsockd was not replaced: the process has ended"):
            fabric.control.replace()
        assert fabric.control.status()["pid"] == before
        vsockets.create_connection((2, 5000), context=guest).close()
        broken.unlink()
        assert fabric.control.replace() != before
    fabric.expect_errors()
    assert "broken.toml:1: nonsense: unknown key" in fabric.log


def test_signals_reach_the_vsockd_that_serves(fabric: PrivateFabric) -> None:
    """The process that a service manager has started stays, and passes signals on."""
    started = fabric.pid
    last = fabric.control.replace()
    os.kill(started, signal.SIGHUP)
    wait_until(lambda: "the configuration was reloaded" in fabric.log, "the reload")
    os.kill(started, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):  # as systemd, which signals all processes
        while True:
            os.kill(last, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{last}").exists(), "vsockd to end")
    ended = os.waitid(os.P_PID, started, os.WEXITED | os.WNOWAIT)
    assert ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
    assert not any(fabric.folder.iterdir())
    with pytest.raises(FabricFailed, match="status 0"):  # it has not been stopped
        fabric.stop()


def test_a_vsockd_that_is_stopped_ends_its_successor(fabric: PrivateFabric) -> None:
    """A signal arrives at any moment of a replacement: both processes end."""
    for _ in range(3):
        with contextlib.suppress(OSError):
            threading.Thread(target=replace_once, args=(fabric.folder,)).start()
        fabric.stop()
        fabric.start()


def test_the_first_process_ends_with_the_last_vsockd(fabric: PrivateFabric) -> None:
    """The status is the last vsockd's, even while a relay continues to serve streams."""
    with tempfile.TemporaryDirectory(prefix="hybrid-", dir="/tmp") as folder:
        path = Path(folder, "v.sock")
        guest = fabric.guest(7, hybrid=path)
        with socket.socket(socket.AF_UNIX) as service:
            service.bind(f"{path}_1024")
            service.listen()
            with vsockets.create_connection((2, 1024), context=guest):  # starts the relay
                accepted, _ = service.accept()
                fabric.control.replace()
                last = fabric.control.replace()
                fabric.control.status()  # then it serves
                os.kill(last, signal.SIGKILL)
                with pytest.raises(FabricFailed, match=f"status {128 + signal.SIGKILL}"):
                    wait_until(lambda: has_ended(fabric), "the first process to end", PATIENCE)
                    fabric.stop()
                accepted.close()


def has_ended(fabric: PrivateFabric) -> bool:
    """Return whether the process that the fabric has started has ended."""
    return bool(os.waitid(os.P_PID, fabric.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))


def test_a_predecessor_that_is_stopped_ends_later() -> None:
    """The successor waits however long the predecessor is stopped: one of them always serves."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    failed: list[OSError] = []

    def confirm() -> None:
        predecessor = succession.Predecessor(theirs.detach(), succession.FORMAT)
        try:
            predecessor.confirm()
        except OSError as error:
            failed.append(error)

    before, succession._RESTORE_SECONDS = succession._RESTORE_SECONDS, 0.05
    try:
        successor = threading.Thread(target=confirm)
        successor.start()
        assert ours.recv(64) == b"taken"
        successor.join(0.5)
        assert successor.is_alive(), failed
    finally:
        succession._RESTORE_SECONDS = before
        ours.close()
    successor.join(PATIENCE)
    assert not successor.is_alive() and not failed


def test_a_folder_that_is_moved_meanwhile_ends_the_successor(
    fabric: PrivateFabric, guest: Attachment
) -> None:
    """Neither vsockd watches the folder between the state and the successor's beginning."""
    started = fabric.pid
    # They take time to restore.
    listening = [vsockets.create_server((guest.cid, 5000 + at), context=guest) for at in range(500)]
    threading.Thread(target=replace_once, args=(fabric.folder,)).start()
    lock = str(fabric.folder / LOCK)
    while not (successor := holder_among_children(started, lock)):
        pass  # the handover takes milliseconds
    os.kill(successor, signal.SIGSTOP)
    moved = fabric.folder.with_name("moved")
    fabric.folder.rename(moved)
    os.kill(successor, signal.SIGCONT)
    ended = os.waitid(os.P_PID, started, os.WEXITED | os.WNOWAIT)
    assert ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 1)
    assert not Path(f"/proc/{successor}").exists()
    for sock in listening:
        sock.close()
    moved.rename(fabric.folder)
    fabric.expect_errors()
    with pytest.raises(FabricFailed, match="status 1"):
        fabric.stop()


def holder_among_children(pid: int, file: str) -> int:
    """Return the id of a child of ``pid`` that has ``file`` open, or 0."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{child}/fd").iterdir():
                if os.readlink(link) == file:
                    return int(child)
    return 0


def replace_once(folder: Path) -> None:
    with contextlib.suppress(OSError), Control(folder) as control:
        control.replace()


def all_beyond(numbers: list[int], before: list[int]) -> bool:
    return all(number > earlier for number, earlier in zip(numbers, before, strict=True))


def test_clients_go_on_while_vsockd_is_replaced(fabric: PrivateFabric, guest: Attachment) -> None:
    """A short form of ``make soak``."""
    problems: list[Any] = []
    done = threading.Event()
    served = [0, 0, 0]

    def connecting(number: int, server: vsockets.socket) -> None:
        while not done.is_set():
            with vsockets.create_connection(server.getsockname(), context=guest) as client:
                accepted, peer = server.accept()
                with accepted:
                    client.sendall(b"%d" % served[number])
                    data = accepted.recv(20)
                if data != b"%d" % served[number] or peer != client.getsockname():
                    problems.append((data, peer))
            served[number] += 1

    def binding() -> None:
        while not done.is_set():
            vsockets.create_server((2, 5001), context=fabric.host).close()
            served[1] += 1

    def sending(one: vsockets.socket, other: vsockets.socket) -> None:
        while not done.is_set():
            with datagram(guest, (guest.cid, 0xFFFF_FFFF)) as sender:
                sender.sendto(b"%d" % served[2], one.getsockname())
                if one.recvfrom(20) != (b"%d" % served[2], sender.getsockname()):
                    problems.append(served[2])
            served[2] += 1

    def noting(work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            problems.append(error)

    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        datagram(fabric.host, (2, 6000)) as service,
    ):
        work = [(connecting, 0, server), (binding,), (sending, service, service)]
        threads = [threading.Thread(target=noting, args=one) for one in work]
        for thread in threads:
            thread.start()
        for _ in range(5):
            before = list(served)
            fabric.control.replace()
            wait_until(partial(all_beyond, served, before), "each of them to go on")
        done.set()
        for thread in threads:
            thread.join()
    assert problems == []
