"""Reports of the host's listeners to a device, and streams that its guest hands over."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.control import Control
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, Role
from vsockets.testing import PrivateFabric, wait_until

from .users import NOBODY, as_root, user

PATIENCE = 10.0


class Link:
    """A device's link, for its reports only."""

    def __init__(self, control: Control, cid: int) -> None:
        self.cid = cid
        self.sock = control.attach_device(cid, host_ports=True)
        self.sock.settimeout(PATIENCE)

    def told(self) -> tuple[int, Role]:
        """Return the next report: a port of the host, and whether it listens."""
        record = Record.decode(self.sock.recv(RECORD_SIZE))
        assert record.status == 0
        assert record.local_cid == 2
        return record.local_port, Role(record.role)

    def hand_over(self, port: int, op: int = Op.CONNECT) -> socket.socket:
        """Hand over a stream to the host's ``port``; return the guest's end."""
        ours, theirs = socket.socketpair()
        with theirs:
            sizes = 65_536, 128, 262_144
            request = Request(op, 0, VMADDR_CID_ANY, VMADDR_PORT_ANY, 2, port, 0, *sizes)
            socket.send_fds(self.sock, [request.encode()], [theirs.fileno()])
        ours.settimeout(PATIENCE)
        return ours


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        fabric.folder.parent.chmod(0o755)
        yield fabric


@pytest.fixture
def link(fabric: PrivateFabric) -> Iterator[Link]:
    link = Link(fabric.control, fabric.control.add_context()["cid"])
    yield link
    link.sock.close()


def test_listeners_come_and_go(fabric: PrivateFabric, link: Link) -> None:
    with vsockets.create_server((2, 5000), context=fabric.host) as server:
        assert link.told() == (5000, Role.LISTENING)
        server.listen(5)  # once more, which is no news
        with vsockets.create_server((2, 5001), context=fabric.host):
            assert link.told() == (5001, Role.LISTENING)
        assert link.told() == (5001, Role.NOT_LISTENING)
        other = Link(fabric.control, fabric.control.add_context()["cid"])
        assert other.told() == (5000, Role.LISTENING)
        other.sock.close()
    assert link.told() == (5000, Role.NOT_LISTENING)


def test_bound_is_not_listening(fabric: PrivateFabric, link: Link) -> None:
    with vsockets.socket(context=fabric.host) as sock:
        sock.bind((2, 5002))
        with vsockets.create_server((2, 5003), context=fabric.host):
            assert link.told() == (5003, Role.LISTENING)
            sock.listen()
            assert link.told() == (5002, Role.LISTENING)


def test_a_suspended_guest_has_none(fabric: PrivateFabric, link: Link) -> None:
    with vsockets.create_server((2, 5004), context=fabric.host):
        assert link.told() == (5004, Role.LISTENING)
        for away, back in (
            (fabric.control.suspend, fabric.control.resume),
            (
                lambda cid: fabric.control.fault_tolerance(cid, True),
                lambda cid: fabric.control.fault_tolerance(cid, False),
            ),
        ):
            away(link.cid)
            assert link.told() == (5004, Role.NOT_LISTENING)
            back(link.cid)
            assert link.told() == (5004, Role.LISTENING)


@as_root
def test_an_isolated_guests_device_gets_trusted_endpoints(fabric: PrivateFabric) -> None:
    (fabric.configuration / "a.toml").write_text(
        '[[context]]\ncid = 70\nprofile = "restricted"\nowner = 54321\n'
    )
    fabric.control.reload()
    link = Link(fabric.control, 70)
    with user(NOBODY):
        server = vsockets.create_server((2, 5005), context=fabric.host)
    with server, vsockets.create_server((2, 5006), context=fabric.host):
        assert link.told() == (5006, Role.LISTENING)  # root's, not user nobody's
        with link.hand_over(5005) as stream:
            assert stream.recv(1) == b""
        row = next(row for row in fabric.control.contexts() if row["cid"] == 70)
        assert row["denials"] == {"restricted": 1}
        (fabric.configuration / "a.toml").write_text("[[context]]\ncid = 70\n")
        fabric.control.reload()
        assert link.told() == (5005, Role.LISTENING)
        with link.hand_over(5005) as stream:
            accepted, peer = server.accept()
            assert peer[0] == 70
            stream.sendall(b"x")
            assert accepted.recv(1) == b"x"
            accepted.close()
    link.sock.close()


def test_a_device_that_does_not_read(fabric: PrivateFabric, link: Link) -> None:
    """A slow device gets the reports later, with the state at that time."""
    servers = [
        vsockets.create_server((2, VMADDR_PORT_ANY), context=fabric.host) for _ in range(600)
    ]
    for server in servers[:-1]:
        server.close()
    last = servers[-1].getsockname()[1]
    wait_until(lambda: len(fabric.control.sockets()) == 1, "all to be forgotten", PATIENCE)
    present: set[int] = set()
    told = 0
    while last not in present or len(present) > 1:
        port, role = link.told()
        present ^= {port}
        assert (port in present) == (role is Role.LISTENING)
        told += 1
    assert told < 2 * len(servers) - 1
    servers[-1].close()
    assert link.told() == (last, Role.NOT_LISTENING)


def test_streams_handed_over(fabric: PrivateFabric, link: Link) -> None:
    with vsockets.create_server((2, 5007), context=fabric.host) as server:
        assert link.told() == (5007, Role.LISTENING)
        with link.hand_over(5007) as stream:
            stream.sendall(b"x")
            accepted, peer = server.accept()
            assert peer[0] == link.cid
            assert peer[1] >= 1024
            assert accepted.recv(1) == b"x"
            stream.setblocking(False)
            with pytest.raises(BlockingIOError):  # it was told nothing
                stream.recv(1)
            accepted.sendall(b"y")
            stream.settimeout(PATIENCE)
            assert stream.recv(2) == b"y"
            accepted.close()
    with link.hand_over(5007) as stream:
        assert stream.recv(1) == b""


@pytest.mark.parametrize("op", [Op.BIND, Op.LISTEN, Op.UPDATE, Op.QUERY, Op.CATCH_ALL, 99])
def test_other_requests_with_a_stream_are_refused(
    fabric: PrivateFabric, link: Link, op: int
) -> None:
    with link.hand_over(5008, op) as stream:
        with contextlib.suppress(BrokenPipeError):
            stream.sendall(b"x")
        with contextlib.suppress(ConnectionResetError):
            assert stream.recv(1) == b""
    assert fabric.control.status()["listeners"] == 0
    wait_until(lambda: not fabric.control.sockets(), "it to be forgotten", PATIENCE)


def test_a_descriptor_of_no_stream_leaves_the_link_open(fabric: PrivateFabric, link: Link) -> None:
    request = Request(Op.CONNECT, 0, VMADDR_CID_ANY, VMADDR_PORT_ANY, 2, 5009).encode()
    reader, writer = os.pipe()
    socket.send_fds(link.sock, [request], [reader])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        socket.send_fds(link.sock, [request], [datagrams.fileno()])
    os.close(reader)
    with vsockets.create_server((2, 5009), context=fabric.host):
        assert link.told() == (5009, Role.LISTENING)  # it goes on
    os.close(writer)


def test_only_devices_that_ask_get_reports(fabric: PrivateFabric) -> None:
    quiet = fabric.control.attach_device(fabric.control.add_context()["cid"])
    link = Link(fabric.control, fabric.control.add_context()["cid"])
    with vsockets.create_server((2, 5010), context=fabric.host):
        assert link.told() == (5010, Role.LISTENING)
        quiet.setblocking(False)
        with pytest.raises(BlockingIOError) as nothing:
            quiet.recv(1)
        assert nothing.value.errno == errno.EAGAIN
    quiet.close()
    link.sock.close()
