"""Connections are dropped in every process that has a descriptor of them.

vsockd searches for the end that it handed to a listener, so that end is in an unusual place in
these tests; the other end is the test's own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .guest_changes import (
    Holder,
    Machine,
    assert_ended,
    assert_stands,
    every_drop,
    machine,
    stream,
)
from .raw_client import GUEST, PROMPT, ask, compiled, connect, enter, guest_of, state

#: The same as stream_holder.c, in Python.
PYTHON_HOLDER = """
import errno, sys, vsockets
sock = vsockets.socket(fileno=int(sys.argv[1]))
print("holds it", flush=True)
try:
    while sock.recv(4096):
        pass
    print("read: end", flush=True)
except OSError as error:
    print("read:", errno.errorcode[error.errno], flush=True)
try:
    sock.send(b"x")
except OSError as error:
    print("write:", errno.errorcode[error.errno], flush=True)
"""

#: The same, with a descriptor received over a socket.
PASSED_HOLDER = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
sys.argv[1] = socket.recv_fds(channel, 1, 1)[1][0]
"""


@pytest.fixture
def guest(shared_fabric: PrivateFabric) -> Iterator[Machine]:
    with machine(shared_fabric) as guest:
        yield guest


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("stream_holder.c", tmp_path_factory.mktemp("holder"))


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@every_drop
@pytest.mark.parametrize("language", ["python", "c"])
def test_a_program_that_inherited_it_through_exec(
    shared_fabric: PrivateFabric, guest: Machine, c_program: Path, how: str, language: str
) -> None:
    command = python(PYTHON_HOLDER) if language == "python" else [os.fspath(c_program)]
    with (
        stream(shared_fabric.host, guest.context) as (accepted, connected),
        Holder(command, accepted.fileno()) as holder,
    ):
        accepted.close()
        assert guest.drop(how)["streams_left"] == []
        assert_ended(connected)
        holder.assert_told()


@every_drop
def test_a_program_of_the_guest(
    shared_fabric: PrivateFabric, guest: Machine, c_program: Path, how: str
) -> None:
    with (
        stream(guest.context, shared_fabric.host) as (accepted, connected),
        Holder([os.fspath(c_program)], accepted.fileno()) as holder,
    ):
        accepted.close()
        guest.drop(how)
        assert_ended(connected)
        holder.assert_told()


@every_drop
def test_the_connecting_end_in_a_c_program(
    shared_fabric: PrivateFabric, guest: Machine, c_program: Path, how: str
) -> None:
    with (
        stream(shared_fabric.host, guest.context) as (accepted, connected),
        Holder([os.fspath(c_program)], connected.fileno()) as holder,
    ):
        connected.close()
        guest.drop(how)
        assert_ended(accepted)
        holder.assert_told()


def test_a_program_that_received_the_descriptor(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    here, there = socket.socketpair()
    with here, there, stream(shared_fabric.host, guest.context) as (accepted, connected):
        socket.send_fds(here, [b"x"], [accepted.fileno()])
        accepted.close()
        with Holder(python(PASSED_HOLDER + PYTHON_HOLDER), there.fileno()) as holder:
            guest.drop("suspend")
            assert_ended(connected)
            holder.assert_told()


def test_one_end_in_transit_between_processes(shared_fabric: PrivateFabric, guest: Machine) -> None:
    """The accepting end is in no process, but the other end is found."""
    here, there = socket.socketpair()
    with here, there, stream(shared_fabric.host, guest.context) as (accepted, connected):
        socket.send_fds(here, [b"x"], [accepted.fileno()])
        accepted.close()
        assert guest.drop("suspend")["streams_left"] == []
        assert_ended(connected)
        with received_from(there) as received:
            assert_ended(received)


def test_both_ends_in_transit_between_processes(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    """Neither is in a process, so the stream ends when a process has received one."""
    here, there = socket.socketpair()
    with here, there, stream(shared_fabric.host, guest.context) as (accepted, connected):
        ends = [accepted.fileno(), connected.fileno()]
        address = list(connected.getsockname())
        for end in ends:
            socket.send_fds(here, [b"x"], [end])
        accepted.close()
        connected.close()
        (left,) = guest.drop("suspend")["streams_left"]
        assert left["local"] == address
        for _ in ends:
            with received_from(there) as received:
                assert_ended(received)


def received_from(channel: socket.socket) -> socket.socket:
    _, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
    return socket.socket(fileno=fd)


def test_a_stopped_program(shared_fabric: PrivateFabric, guest: Machine, c_program: Path) -> None:
    with (
        stream(shared_fabric.host, guest.context) as (accepted, connected),
        Holder([os.fspath(c_program)], accepted.fileno()) as holder,
    ):
        accepted.close()
        holder.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(holder.process.pid) == "T", "the program to stop")
        assert guest.drop("suspend")["streams_left"] == []
        assert_ended(connected)
        assert state(holder.process.pid) == "T"
        holder.process.send_signal(signal.SIGCONT)
        holder.assert_told()


def test_servers_that_forked(shared_fabric: PrivateFabric, guest: Machine, c_program: Path) -> None:
    """One stream in many processes ends in each of them."""
    with (
        stream(shared_fabric.host, guest.context) as (accepted, connected),
        contextlib.ExitStack() as stack,
    ):
        command = [os.fspath(c_program)]
        holders = [stack.enter_context(Holder(command, accepted.fileno())) for _ in range(20)]
        accepted.close()
        guest.drop("suspend")
        assert_ended(connected)
        for holder in holders:
            holder.assert_told()


def test_a_program_whose_parent_accepted_it_and_has_ended(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    """The process that vsockd knows has exited."""
    with (
        vsockets.create_server((2, 5000), context=shared_fabric.host) as server,
        vsockets.create_connection((2, 5000), context=guest.context) as connected,
    ):
        here, there = socket.socketpair()
        parent = os.fork()
        if parent == 0:
            accepted, _ = server.accept()
            server.close()
            if os.fork() == 0:
                there.sendall(b"has it")
                with contextlib.suppress(OSError):
                    accepted.recv(1)
                there.sendall(b"ended")
            os._exit(0)
        with here, there:
            os.waitpid(parent, 0)
            assert here.recv(6) == b"has it"
            server.close()
            guest.drop("suspend")
            assert_ended(connected)
            here.settimeout(PROMPT)
            assert here.recv(5) == b"ended"


# Connections not yet accepted


@every_drop
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_one_in_a_backlog(
    shared_fabric: PrivateFabric, guest: Machine, how: str, kind: int
) -> None:
    with vsockets.socket(type=kind, context=shared_fabric.host) as server:
        server.bind((2, 5000))
        server.listen()
        with (
            vsockets.socket(type=kind, context=guest.context) as blocking,
            vsockets.socket(type=kind, context=guest.context) as polling,
        ):
            blocking.connect((2, 5000))
            blocking.send(b"queued")
            polling.setblocking(False)
            with pytest.raises(BlockingIOError):
                polling.connect((2, 5000))
            assert select.select([], [polling], [], PROMPT)[1]
            assert polling.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            guest.drop(how)
            assert select.select([polling], [], [], PROMPT)[0]
            assert_ended(blocking)
            assert_ended(polling)
            for queued in (b"queued", b""):
                accepted, _ = server.accept()
                with accepted:
                    assert_ended(accepted, queued)


def test_one_in_a_backlog_with_a_hidden_connecting_end(
    shared_fabric: PrivateFabric, guest: Machine
) -> None:
    """Without its cookie the connecting end is not found, but the accepted one is, soon."""
    with (
        vsockets.create_server((2, 5000), context=shared_fabric.host) as server,
        enter(guest.context) as hidden,
    ):
        assert ask(hidden, connect(2, 5000)).status == 0
        assert len(guest.drop("suspend")["streams_left"]) == 1
        accepted, _ = server.accept()
        with accepted:
            assert_ended(accepted)
            assert_ended(hidden)


# Many


def test_a_thousand_at_once(shared_fabric: PrivateFabric, guest: Machine) -> None:
    with (
        vsockets.create_server((2, 5000), context=shared_fabric.host) as server,
        stream(shared_fabric.host, guest_of(shared_fabric)) as others,
        contextlib.ExitStack() as stack,
    ):
        ends = []
        for _ in range(1000):
            connected = stack.enter_context(
                vsockets.create_connection((2, 5000), context=guest.context)
            )
            ends += [connected, stack.enter_context(server.accept()[0])]
        with shared_fabric.control.events("context") as events:
            assert guest.drop("suspend")["streams_left"] == []
            assert events.wait(PROMPT)["dropped"] == 1000
        for end in ends:
            assert_ended(end)
        assert_stands(*others)
        assert {row["context"] for row in shared_fabric.control.sockets()} == {2, GUEST}
