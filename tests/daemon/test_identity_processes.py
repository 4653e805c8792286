"""The identity of a program: attempts to be taken for another one.

The attackers are processes of a user without privileges.  They have connections that other
processes made, process ids that others had, and programs with more rights than their own.
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
    PROMPT,
    SOCKET_TYPES,
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
    """Run ``work`` in a forked process; yield its pid and the other end of its socket."""
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


# Connections inherited from other processes


def test_an_inherited_connection(fabric: PrivateFabric) -> None:
    """Root connects, passes the connection to a user, and exits: the user gains no right."""

    def leave(channel: socket.socket) -> None:
        send_descriptor(channel, enter(fabric.host))

    pid, channel = in_another_process(leave)
    with channel:
        orphan = receive_socket(channel)
    os.waitpid(pid, 0)
    with orphan:
        assert ask(orphan, bind(700)).status == errno.EACCES


@as_administrator
def test_an_inherited_connection_whose_process_id_is_reused_by_root(
    fabric: PrivateFabric,
) -> None:
    """The connecting process's id is assigned again, to a process with all rights."""

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
    """Run a process with the id of one that has exited: pids are assigned in turn."""
    for _ in range(1000):  # other processes take ids, too
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


@pytest.mark.parametrize("kind", SOCKET_TYPES)
def test_a_connection_that_a_privileged_parent_made(fabric: PrivateFabric, kind: int) -> None:
    """A child with fewer rights has only its own on that connection."""
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
    """A vSockets socket has no identity before it is bound: then it gets the binder's."""
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
    """A server gets the connecting process from vsockd, and vsockd from the kernel."""
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
    """Do what ``setcap cap_net_bind_service+ep`` does: see capability.h, VFS_CAP_REVISION_2."""
    effective, revision = 1, 0x0200_0000
    value = struct.pack("<5I", revision | effective, 1 << CAP_NET_BIND_SERVICE, 0, 0, 0)
    os.setxattr(program, "security.capability", value)


def privileged_by_user(program: Path) -> None:
    program.chmod(0o4755)


@pytest.mark.parametrize("privileged", [privileged_by_file, privileged_by_user])
def test_executing_a_privileged_program_between_connect_and_request(
    fabric: PrivateFabric, programs: Path, privileged: Callable[[Path], None]
) -> None:
    """The connection is passed to an accomplice, and the connecting process becomes another.

    Its later rights are those of the executed program, and not of the connection.
    """
    program = programs / f"client_{privileged.__name__}"
    shutil.copy(programs / "request_client", program)
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
    """As by systemd's AmbientCapabilities: a user's process with rights of its own."""
    name = "+net_bind_service"
    given = [
        *("setpriv", "--reuid", str(NOBODY), "--clear-groups"),
        *("--inh-caps", name, "--ambient-caps", name),
    ]
    assert ask_by_program(programs / "request_client", fabric, bind(700), *given).status == 0
    assert ask_by_program(programs / "request_client", fabric, bind(700)).status == errno.EACCES


@as_administrator
def test_root_of_an_own_namespace(fabric: PrivateFabric, programs: Path) -> None:
    """All capabilities of that namespace count for nothing here."""
    mine = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "unshare", "--user"]
    answer = ask_by_program(
        programs / "request_client", fabric, bind(700), *mine, "--map-root-user"
    )
    assert answer.status == errno.EACCES


# Access to vsockd itself


def test_vsockds_files_descriptors_and_memory(fabric: PrivateFabric) -> None:
    """A process without privileges cannot access its folder, descriptors or memory."""

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


@pytest.mark.parametrize("sock_type", SOCKET_TYPES)
def test_control_sockets_of_another_owners_guest(fabric: PrivateFabric, sock_type: int) -> None:
    fabric.guest(3)
    theirs = fabric.guest(4, owner=NOBODY)

    def knock(channel: socket.socket) -> None:
        become_nobody()
        opened = []
        for folder in ("0", "2", "3", "4"):
            with contextlib.suppress(PermissionError):
                attachment = vsockets.Attachment(fabric.folder / folder)
                assert ask_once(attachment, bind(ANY), sock_type).status == 0
                opened.append(folder)
        channel.sendall(" ".join(opened).encode())

    pid, channel = in_another_process(knock)
    with channel:
        assert channel.recv(100) == b"2 4"
    os.waitpid(pid, 0)
    assert theirs.cid == 4
