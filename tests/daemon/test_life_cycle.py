"""Effects of suspend, resume, migrate, FT mode and power-off on a guest's sockets only.

"VMware vSockets lose connection after suspend and resume of a virtual machine", "do not survive
live migration", "are dropped when a virtual machine is put into fault tolerance mode, and no new
vSockets connections can be established while a virtual machine is in FT mode" (guide page 7).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest

import vsockets
from vsockets import Attachment
from vsockets.testing import PrivateFabric

from .guest_changes import (
    MACHINE,
    Machine,
    assert_ended,
    assert_stands,
    every_drop,
    machine,
    stream,
)
from .raw_client import (
    LOCAL_CID,
    PROMPT,
    ask,
    ask_once,
    connect,
    descriptors,
    enter,
    guest_of,
    paused,
)

STREAM, SEQPACKET, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM
LIVED_THROUGH = pytest.mark.parametrize("how", ["suspend", "migrate", "ft on"])


@pytest.fixture
def guest(shared_fabric: PrivateFabric) -> Iterator[Machine]:
    with machine(shared_fabric) as guest:
        yield guest


@contextlib.contextmanager
def datagrams(context: Attachment, address: tuple[int, int]) -> Iterator[vsockets.socket]:
    with vsockets.socket(type=DATAGRAM, context=context) as sock:
        sock.bind(address)
        sock.settimeout(PROMPT)
        yield sock


def errno_of_connecting(context: Attachment, address: tuple[int, int]) -> int:
    with vsockets.socket(context=context) as sock:
        return sock.connect_ex(address)


# Streams that end


@every_drop
@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
@pytest.mark.parametrize("guest_listens", [False, True])
def test_both_ends_see_the_end(
    shared_fabric: PrivateFabric, guest: Machine, how: str, kind: int, guest_listens: bool
) -> None:
    sides = (shared_fabric.host, guest.context)
    with stream(*(sides[::-1] if guest_listens else sides), kind) as (accepted, connected):
        assert_stands(accepted, connected)
        guest.drop(how)
        assert_ended(accepted)
        assert_ended(connected)


@every_drop
def test_a_stream_within_the_guest_ends_too(guest: Machine, how: str) -> None:
    with stream(guest.context, guest.context) as (accepted, connected):
        guest.drop(how)
        assert_ended(accepted)
        assert_ended(connected)


@every_drop
def test_data_sent_before_can_be_read(
    shared_fabric: PrivateFabric, guest: Machine, how: str
) -> None:
    with stream(shared_fabric.host, guest.context) as (accepted, connected):
        accepted.sendall(b"last words")
        connected.sendall(b"of both")
        guest.drop(how)
        assert connected.recv(100) == b"last words"
        assert accepted.recv(100) == b"of both"
        assert_ended(accepted)
        assert_ended(connected)


@every_drop
def test_a_blocked_reader_is_woken(shared_fabric: PrivateFabric, guest: Machine, how: str) -> None:
    async def both_read() -> None:
        with stream(shared_fabric.host, guest.context) as ends:
            loop = asyncio.get_running_loop()
            for end in ends:
                end.setblocking(False)
            reads = [asyncio.ensure_future(loop.sock_recv(end, 10)) for end in ends]
            await asyncio.sleep(0)
            guest.drop(how)
            assert await asyncio.wait_for(asyncio.gather(*reads), PROMPT) == [b"", b""]

    asyncio.run(both_read())


@every_drop
def test_a_blocked_writer_is_woken(shared_fabric: PrivateFabric, guest: Machine, how: str) -> None:
    with stream(shared_fabric.host, guest.context) as (accepted, connected):
        for end in (accepted, connected):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    end.send(bytes(65_536))
        poll = select.poll()
        for end in (accepted, connected):
            poll.register(end, select.POLLOUT)
        assert poll.poll(0) == []
        guest.drop(how)
        assert len(poll.poll(PROMPT * 1000)) == 2
        for end in (accepted, connected):
            with pytest.raises(BrokenPipeError):
                end.send(b"x")


# Sockets that stay


@every_drop
def test_streams_of_others_stay(shared_fabric: PrivateFabric, guest: Machine, how: str) -> None:
    other = guest_of(shared_fabric)
    with (
        stream(shared_fabric.host, other) as of_another,
        stream(other, shared_fabric.host) as to_another,
        stream(shared_fabric.host, shared_fabric.host) as of_the_host,
        stream(shared_fabric.host, guest.context) as dropped,
    ):
        guest.drop(how)
        assert_ended(dropped[0])
        for ends in (of_another, to_another, of_the_host):
            assert_stands(*ends)


@every_drop
def test_a_listener_of_the_other_side_stays(
    shared_fabric: PrivateFabric, guest: Machine, how: str
) -> None:
    with vsockets.create_server((2, 5000), context=shared_fabric.host) as server:
        with vsockets.create_connection((2, 5000), context=guest.context):
            server.accept()[0].close()
            guest.drop(how)
        guest.end_of(how)
        with vsockets.create_connection((2, 5000), context=guest.context) as client:
            accepted, source = server.accept()
            with accepted:
                assert source == client.getsockname()
                assert_stands(accepted, client)


@LIVED_THROUGH
def test_the_guests_own_sockets_stay(
    shared_fabric: PrivateFabric, guest: Machine, how: str
) -> None:
    """A listener and a bound socket are in the guest's memory, which suspend keeps."""
    with (
        vsockets.create_server((MACHINE, 5000), context=guest.context) as server,
        vsockets.socket(context=guest.context) as bound,
        datagrams(guest.context, (MACHINE, 5000)) as receiver,
        datagrams(shared_fabric.host, (2, 5000)) as sender,
    ):
        bound.bind((MACHINE, 5001))
        guest.drop(how)
        guest.end_of(how)
        with vsockets.create_connection((MACHINE, 5000), context=shared_fabric.host) as client:
            accepted, _ = server.accept()
            with accepted:
                assert_stands(accepted, client)
        with vsockets.create_server((2, 5001), context=shared_fabric.host) as host:
            bound.connect((2, 5001))
            accepted, source = host.accept()
            accepted.close()
            assert source == (MACHINE, 5001)
        sender.sendto(b"x", (MACHINE, 5000))
        assert receiver.recvfrom(10) == (b"x", (2, 5000))


# While it is suspended


def test_a_suspended_guest_neither_sends_nor_receives(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    with (
        vsockets.create_server((MACHINE, 5000), context=guest.context),
        vsockets.create_server((2, 5000), context=shared_fabric.host),
        datagrams(guest.context, (MACHINE, 5000)) as inside,
        datagrams(shared_fabric.host, (2, 5000)) as outside,
    ):
        # Both have routes already, which are then revoked.
        inside.sendto(b"x", (2, 5000))
        outside.sendto(b"x", (MACHINE, 5000))
        guest.drop("suspend")
        assert errno_of_connecting(guest.context, (2, 5000)) == errno.ENETDOWN
        assert errno_of_connecting(guest.context, (MACHINE, 5000)) == errno.ENETDOWN
        assert errno_of_connecting(shared_fabric.host, (MACHINE, 5000)) == errno.EHOSTUNREACH
        for sender, address, code in (
            (inside, (2, 5000), errno.ENETDOWN),
            (outside, (MACHINE, 5000), errno.EHOSTUNREACH),
        ):
            with pytest.raises(OSError) as refusal:
                sender.sendto(b"y", address)
            assert refusal.value.errno == code
        guest.end_of("suspend")
        # What was sent before arrives, and then what is sent afterwards.
        inside.sendto(b"z", (2, 5000))
        outside.sendto(b"z", (MACHINE, 5000))
        for receiver, source in ((outside, (MACHINE, 5000)), (inside, (2, 5000))):
            assert receiver.recvfrom(10) == (b"x", source)
            assert receiver.recvfrom(10) == (b"z", source)


def test_a_connect_that_vsockd_reads_after_the_suspend(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    """Requests sent before a suspend and read by vsockd afterwards are refused."""
    with (
        vsockets.create_server((2, 5000), context=shared_fabric.host) as server,
        enter(guest.context) as late,
    ):
        ask(late, LOCAL_CID._replace(op=1, local_cid=MACHINE, local_port=6000))  # bound
        guest.drop("suspend")
        assert ask(late, connect(2, 5000)).status == errno.ENETDOWN
        assert not select.select([server], [], [], 0)[0]


# FT mode


def test_no_new_connections_in_ft_mode(shared_fabric: PrivateFabric, guest: Machine) -> None:
    with (
        vsockets.create_server((MACHINE, 5000), context=guest.context),
        vsockets.create_server((2, 5000), context=shared_fabric.host),
        datagrams(guest.context, (MACHINE, 5000)) as inside,
        datagrams(shared_fabric.host, (2, 5000)) as outside,
    ):
        guest.drop("ft on")
        assert errno_of_connecting(guest.context, (2, 5000)) == errno.ENETDOWN
        assert errno_of_connecting(shared_fabric.host, (MACHINE, 5000)) == errno.EHOSTUNREACH
        # Datagrams are no connections.
        inside.sendto(b"out", (2, 5000))
        assert outside.recvfrom(10) == (b"out", (MACHINE, 5000))
        outside.sendto(b"in", (MACHINE, 5000))
        assert inside.recvfrom(10) == (b"in", (2, 5000))
        # Suspended and resumed, it is in FT mode still.
        shared_fabric.control.suspend(MACHINE)
        assert shared_fabric.control.resume(MACHINE)["context"]["ft"] is True
        assert errno_of_connecting(guest.context, (2, 5000)) == errno.ENETDOWN
        guest.end_of("ft on")
        assert errno_of_connecting(guest.context, (2, 5000)) == 0
        assert errno_of_connecting(shared_fabric.host, (MACHINE, 5000)) == 0


# Power-off


def test_nothing_is_left_after_power_off(shared_fabric: PrivateFabric, guest: Machine) -> None:
    before = descriptors(shared_fabric.pid)
    with (
        stream(guest.context, shared_fabric.host),
        stream(shared_fabric.host, guest.context),
        vsockets.create_server((MACHINE, 5000), context=guest.context) as server,
        vsockets.socket(context=guest.context) as bound,
        datagrams(guest.context, (MACHINE, 5000)) as inside,
        datagrams(shared_fabric.host, (2, 5000)) as outside,
        enter(guest.context) as silent,
        vsockets.create_server((2, 5001), context=shared_fabric.host),
        vsockets.create_connection((2, 5001), context=guest.context) as waiting,
    ):
        bound.bind((MACHINE, 5001))
        inside.sendto(b"x", (2, 5000))
        outside.sendto(b"x", (MACHINE, 5000))
        row = guest.drop("power-off")["context"]
        assert (row["state"], row["usage"]["sockets"]) == ("off", 0)
        assert not guest.context.folder.exists()
        assert {row["context"] for row in shared_fabric.control.sockets()} == {2}
        # Beside the guest's control sockets, vsockd has closed all but the host's two sockets, and
        # an epoll for those.
        assert descriptors(shared_fabric.pid) == before - 2 + 3
        assert_ended(waiting)
        assert silent.recv(10) == b""
        with pytest.raises(OSError) as refusal:
            server.accept()
        assert refusal.value.errno == errno.ENETDOWN
        # No new program can connect, and no present one can send.
        with pytest.raises(OSError) as refusal:
            vsockets.create_connection((2, 5001), context=guest.context)
        assert refusal.value.errno == errno.ENODEV
        with pytest.raises(OSError) as refusal:
            inside.sendto(b"x", (2, 5000))
        assert refusal.value.errno == errno.ENODEV
        assert errno_of_connecting(shared_fabric.host, (MACHINE, 5000)) == errno.EHOSTUNREACH
        with pytest.raises(OSError) as refusal:
            outside.sendto(b"x", (MACHINE, 5000))
        assert refusal.value.errno == errno.EHOSTUNREACH

        guest.end_of("power-off")
        # Sockets from before are unknown after power-on, when all ports are free.
        with (
            vsockets.create_server((MACHINE, 5000), context=guest.context),
            vsockets.create_server((MACHINE, 5001), context=guest.context),
            datagrams(guest.context, (MACHINE, 5000)) as anew,
        ):
            with pytest.raises(OSError) as refusal:
                inside.sendto(b"from the old life", (2, 5000))
            assert refusal.value.errno == errno.EINVAL
            outside.sendto(b"hello", (MACHINE, 5000))
            assert anew.recvfrom(10) == (b"hello", (2, 5000))
            assert errno_of_connecting(shared_fabric.host, (MACHINE, 5000)) == 0


def test_requests_in_progress_at_power_off_are_refused(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    """The requests were sent before the power-off, and vsockd has not read them yet."""
    with contextlib.ExitStack() as stack:
        with paused(shared_fabric.pid):
            late = [stack.enter_context(enter(guest.context)) for _ in range(20)]
            for sock in late:
                sock.send(LOCAL_CID.encode())
            off = b'{"op": "context.change", "cid": %d, "change": "power-off"}\n' % MACHINE
            administrator = stack.enter_context(socket.socket(socket.AF_UNIX))
            administrator.connect(os.fspath(shared_fabric.folder / "control"))
            administrator.send(off)
        assert b'"ok"' in administrator.recv(4096)
        for sock in late:
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
        guest.end_of("power-off")
        assert ask_once(guest.context, LOCAL_CID).local_cid == MACHINE


def test_repeated_changes(shared_fabric: PrivateFabric, guest: Machine) -> None:
    for _ in range(10):
        for how in ("suspend", "migrate", "ft on", "power-off"):
            with stream(shared_fabric.host, guest.context) as (accepted, connected):
                guest.drop(how)
                assert_ended(accepted)
                assert_ended(connected)
            guest.end_of(how)


def test_refused_changes(shared_fabric: PrivateFabric, guest: Machine) -> None:
    control = shared_fabric.control
    refusals: dict[str, Callable[[], object]] = {
        "cannot resume context 5: it is running": lambda: control.resume(MACHINE),
        "cannot power-on context 5: it is running": lambda: control.power_on(MACHINE),
        "context 5 is not in FT mode already": lambda: control.fault_tolerance(MACHINE, False),
        "cannot suspend context 2: it is the host": lambda: control.suspend(2),
    }
    for text, change in refusals.items():
        with pytest.raises(OSError, match=text) as refusal:
            change()
        assert refusal.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="no context 77") as refusal:
        control.suspend(77)
    assert refusal.value.errno == errno.ENOENT


@pytest.mark.parametrize("guest_listens", [False, True])
def test_a_guest_with_streams_is_not_removed(
    shared_fabric: PrivateFabric, guest: Machine, guest_listens: bool
) -> None:
    sides = (shared_fabric.host, guest.context)
    with stream(*(sides[::-1] if guest_listens else sides)) as ends:
        with pytest.raises(OSError, match="context 5 has 1 open streams") as refusal:
            shared_fabric.control.remove_context(MACHINE)
        assert refusal.value.errno == errno.EBUSY
        assert_stands(*ends)
        guest.drop("power-off")
        shared_fabric.control.remove_context(MACHINE)
