"""Who a program is: what others try to be taken for somebody they are not.

The attackers are processes of a user without privileges.  They have connections that others made,
process ids that others had, and programs that have more rights than they.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.protocol import RECORD_SIZE, Record
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    ANY,
    DOORS,
    PROMPT,
    ask,
    ask_once,
    bind,
    connect,
    enter,
    listen,
)
from .users import (
    CAP_NET_BIND_SERVICE,
    NOBODY,
    as_administrator,
    as_root,
    ask_by_program,
    has_capability,
)

pytestmark = as_root


def in_another_process(work: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """``work`` in a forked process; returns its pid and the other end of its socket."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            work(there)
        finally:
            os._exit(0)
    there.close()
    here.settimeout(2 * PROMPT)
    return pid, here


def become_nobody(groups: tuple[int, ...] = ()) -> None:
    os.setgroups(groups)
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def send_descriptor(channel: socket.socket, sock: socket.socket) -> None:
    socket.send_fds(channel, [b"x"], [sock.fileno()])


def receive_socket(channel: socket.socket) -> socket.socket:
    _, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
    sock = socket.socket(fileno=fd)
    sock.settimeout(PROMPT)
    return sock


# Connections left to others


def test_a_connection_left_behind(fabric: PrivateFabric) -> None:
    """Root connects, gives the connection to nobody, and ends: nobody gets nothing by it."""

    def leave(channel: socket.socket) -> None:
        send_descriptor(channel, enter(fabric.host))

    pid, channel = in_another_process(leave)
    with channel:
        orphan = receive_socket(channel)
    os.waitpid(pid, 0)
    with orphan:
        assert ask(orphan, bind(700)).status == errno.EACCES


@as_administrator
def test_a_connection_left_behind_whose_process_id_is_another_roots(
    fabric: PrivateFabric,
) -> None:
    """The number of the process that connected is given out again, to one with all rights."""

    def leave(channel: socket.socket) -> None:
        send_descriptor(channel, enter(fabric.host))

    pid, channel = in_another_process(leave)
    with channel:
        orphan = receive_socket(channel)
    os.waitpid(pid, 0)
    with orphan, process_with_id(pid) as reborn:
        assert reborn == pid
        assert ask(orphan, bind(700)).status == errno.EACCES
    # Nor does the log name a program that had nothing to do with it, but the one that asked.
    (line,) = [line for line in fabric.log.splitlines() if "reserved-port" in line]
    assert f"pid {os.getpid()} uid 0 {os.path.realpath(sys.executable)}" in line


@contextlib.contextmanager
def process_with_id(pid: int) -> Iterator[int]:
    """A process with the id of one that has ended: pids are given out in turn."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        child = os.fork()
        if child == 0:
            signal.pause()
        if child == pid:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("kind", DOORS)
def test_a_connection_that_a_privileged_parent_made(fabric: PrivateFabric, kind: int) -> None:
    """In the hands of a child with fewer rights it has the child's."""
    with enter(fabric.host) as server, enter(fabric.host, kind) as connection:
        ask(server, bind(5000))
        ask(server, listen())

        def use(channel: socket.socket) -> None:
            become_nobody()
            channel.sendall(bytes([ask(connection, bind(700)).status]))
            if kind == socket.SOCK_STREAM:
                channel.sendall(bytes([ask(connection, connect(2, 5000)).status]))

        pid, channel = in_another_process(use)
        with channel:
            assert channel.recv(1) == bytes([errno.EACCES])
            if kind == socket.SOCK_STREAM:
                assert channel.recv(1) == b"\0"
        os.waitpid(pid, 0)
        (line,) = [line for line in fabric.log.splitlines() if "reserved-port" in line]
        assert f"pid {pid} uid {NOBODY} " in line
        if kind == socket.SOCK_STREAM:
            announced = Record.decode(server.recv(RECORD_SIZE))
            assert (announced.pid, announced.uid) == (pid, NOBODY)


def test_a_socket_that_a_privileged_parent_made(fabric: PrivateFabric) -> None:
    """A vSockets socket is nobody's before it is bound: then it is his who binds it."""
    with vsockets.socket(context=fabric.host) as sock:

        def use(channel: socket.socket) -> None:
            become_nobody()
            try:
                sock.bind((2, 700))
            except OSError as refusal:
                channel.sendall(bytes([refusal.errno or 0]))
            else:
                channel.sendall(b"\0")

        pid, channel = in_another_process(use)
        with channel:
            assert channel.recv(1) == bytes([errno.EACCES])
        os.waitpid(pid, 0)


def test_the_program_that_connected_is_the_one_that_is_shown(fabric: PrivateFabric) -> None:
    """A server reads who connected from vsockd, and vsockd from the kernel."""
    with vsockets.create_server((2, 5000), context=fabric.host) as server:

        def reach(channel: socket.socket) -> None:
            become_nobody()
            vsockets.create_connection((2, 5000), context=fabric.host).send(b"x")

        pid, channel = in_another_process(reach)
        accepted, _ = server.accept()
        os.waitpid(pid, 0)
        with channel, accepted:
            credentials = accepted.peer_credentials()
            assert (credentials.pid, credentials.uid, credentials.gid) == (pid, NOBODY, NOBODY)


# Programs with more rights


def privileged_by_file(program: Path) -> None:
    """What ``setcap cap_net_bind_service+ep`` does: see capability.h, VFS_CAP_REVISION_2."""
    effective, revision = 1, 0x0200_0000
    value = struct.pack("<5I", revision | effective, 1 << CAP_NET_BIND_SERVICE, 0, 0, 0)
    os.setxattr(program, "security.capability", value)


def privileged_by_user(program: Path) -> None:
    program.chmod(0o4755)


@pytest.mark.parametrize("privileged", [privileged_by_file, privileged_by_user])
def test_executing_a_privileged_program_between_connect_and_request(
    fabric: PrivateFabric, programs: Path, privileged: Callable[[Path], None]
) -> None:
    """The connection goes to an accomplice, and the process that made it becomes another.

    What it may do then is the program's merit.
    """
    program = programs / f"client_{privileged.__name__}"
    shutil.copy(programs / "door_client", program)
    privileged(program)

    def attack(channel: socket.socket) -> None:
        become_nobody()
        send_descriptor(channel, enter(fabric.host))
        os.dup2(channel.fileno(), 0)  # it waits for its input
        os.execv(program, [str(program), str(fabric.host.folder / "seqpacket")])

    pid, channel = in_another_process(attack)
    try:
        with channel, receive_socket(channel) as accomplice:
            wait_until(lambda: is_executing(pid, program), "the program to run")
            assert privileged is privileged_by_user or has_capability(CAP_NET_BIND_SERVICE, pid)
            assert ask(accomplice, bind(700)).status == errno.EACCES
            assert ask(accomplice, bind(7000)).status == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def is_executing(pid: int, program: Path) -> bool:
    return os.readlink(f"/proc/{pid}/exe") == os.fspath(program)


def test_a_service_that_was_given_the_capability(fabric: PrivateFabric, programs: Path) -> None:
    """As by systemd's AmbientCapabilities: a user's process, and the rights are its own."""
    name = "+net_bind_service"
    given = [
        *("setpriv", "--reuid", str(NOBODY), "--clear-groups"),
        *("--inh-caps", name, "--ambient-caps", name),
    ]
    assert ask_by_program(programs / "door_client", fabric, bind(700), *given).status == 0
    assert ask_by_program(programs / "door_client", fabric, bind(700)).status == errno.EACCES


@as_administrator
def test_root_of_a_namespace_of_ones_own(fabric: PrivateFabric, programs: Path) -> None:
    """All capabilities there are worth nothing here."""
    mine = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "unshare", "--user"]
    answer = ask_by_program(programs / "door_client", fabric, bind(700), *mine, "--map-root-user")
    assert answer.status == errno.EACCES


# Getting at vsockd itself


def test_what_is_vsockds_own(fabric: PrivateFabric) -> None:
    """Nobody without privileges gets at its folder, its descriptors or its memory."""

    def try_all(channel: socket.socket) -> None:
        become_nobody()
        proc = Path(f"/proc/{fabric.pid}")
        attempts: list[Callable[[], object]] = [
            lambda: os.listdir(fabric.folder / "private"),
            lambda: os.listdir(proc / "fd"),
            lambda: os.listdir(proc / "cwd"),
            lambda: os.open(proc / "mem", os.O_RDONLY),
            lambda: os.kill(fabric.pid, signal.SIGSTOP),
            lambda: socket.socket(socket.AF_UNIX).connect(str(fabric.folder / "control")),
            lambda: enter(fabric.hypervisor),
            lambda: os.listdir(fabric.folder / "3"),
            lambda: os.rename(fabric.folder / "2", fabric.folder / "4"),
            lambda: os.unlink(fabric.host.folder / "stream"),
            *(
                lambda fd=fd: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).connect(
                    f"/proc/{fabric.pid}/fd/{fd}"
                )
                for fd in range(40)
            ),
        ]
        succeeded = []
        for number, attempt in enumerate(attempts):
            try:
                attempt()
            except PermissionError:
                pass
            else:
                succeeded.append(number)
        channel.sendall(repr(succeeded).encode())

    fabric.guest(3)
    with vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as datagrams:
        datagrams.bind((2, 5000))
        pid, channel = in_another_process(try_all)
        with channel:
            assert channel.recv(1000) == b"[]"
        os.waitpid(pid, 0)


@pytest.mark.parametrize("door", DOORS)
def test_the_door_of_a_guest_of_another_owner(fabric: PrivateFabric, door: int) -> None:
    fabric.guest(3)
    theirs = fabric.guest(4, owner=NOBODY)

    def knock(channel: socket.socket) -> None:
        become_nobody()
        opened = []
        for folder in ("0", "2", "3", "4"):
            with contextlib.suppress(PermissionError):
                attachment = vsockets.Attachment(fabric.folder / folder)
                assert ask_once(attachment, bind(ANY), door).status == 0
                opened.append(folder)
        channel.sendall(" ".join(opened).encode())

    pid, channel = in_another_process(knock)
    with channel:
        assert channel.recv(100) == b"2 4"
    os.waitpid(pid, 0)
    assert theirs.cid == 4
