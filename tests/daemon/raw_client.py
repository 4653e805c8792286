"""Requests to vsockd byte by byte, without the library, as a hostile program sends them."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from c_compiler import compile_c
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY, Attachment
from vsockets.protocol import RECORD_SIZE, Op, Record, Request
from vsockets.testing import PrivateFabric, wait_until

ANY = VMADDR_PORT_ANY

LOCAL_CID = Request(Op.LOCAL_CID)
SIZES = (65_536, 128, 262_144)

_NAMES = {socket.SOCK_STREAM: "stream", socket.SOCK_SEQPACKET: "seqpacket"}

#: CID of the shared fabric's guest.
GUEST = 3

#: Types of a context's two control sockets.
SOCKET_TYPES = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]

#: Seconds for vsockd to reply when nothing delays it, also on a busy machine.
PROMPT = 10.0


def enter(context: Attachment, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Connect to a context's control socket, without a request."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PROMPT)
    try:
        sock.connect(os.fspath(context.folder / _NAMES[socket.SocketKind(kind)]))
    except BaseException:
        sock.close()
        raise
    return sock


def guest_of(fabric: PrivateFabric) -> Attachment:
    """Return the shared fabric's guest."""
    return Attachment(fabric.folder / str(GUEST))


def ask(sock: socket.socket, request: Request) -> Record:
    sock.send(request.encode())
    return Record.decode(sock.recv(RECORD_SIZE))


def ask_once(context: Attachment, request: Request, kind: int = socket.SOCK_SEQPACKET) -> Record:
    with enter(context, kind) as sock:
        return ask(sock, request)


def bind(port: int = ANY, cookie: int = 0) -> Request:
    return Request(Op.BIND, 0, VMADDR_CID_ANY, port, 0, 0, 0, *SIZES, cookie)


def listen(backlog: int = 128) -> Request:
    return Request(Op.LISTEN, 0, 0, 0, 0, 0, backlog, *SIZES)


def connect(cid: int, port: int) -> Request:
    return Request(Op.CONNECT, 0, 0, 0, cid, port, 0, *SIZES)


def bind_datagram(port: int = ANY) -> Request:
    return Request(Op.BIND_DATAGRAM, 0, VMADDR_CID_ANY, port)


def route(cid: int, port: int) -> Request:
    return Request(Op.ROUTE, 0, VMADDR_CID_ANY, ANY, cid, port)


def send_with(sock: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """Send ``data`` with descriptors."""
    rights = array.array("i", descriptors)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def cookie_of(sock: socket.socket) -> int:
    """Return a socket's SO_COOKIE."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


def unix_datagrams() -> socket.socket:
    """Return a unix datagram socket, as a vSockets one is before it is bound."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def adopt(context: Attachment, datagrams: socket.socket, port: int = ANY) -> Record:
    """Have vsockd bind a datagram socket, by a valid request."""
    with enter(context, socket.SOCK_SEQPACKET) as sock:
        send_with(sock, bind_datagram(port).encode(), [datagrams.fileno()])
        return Record.decode(sock.recv(RECORD_SIZE))


def ask_for_route(
    context: Attachment, sender: socket.socket, address: tuple[int, int]
) -> socket.socket:
    """Return the route from a datagram socket to ``address``, by a valid request.

    Raises OSError with vsockd's errno when it is refused.
    """
    with enter(context, socket.SOCK_SEQPACKET) as sock:
        send_with(sock, route(*address).encode(), [sender.fileno()])
        data, fds, _, _ = socket.recv_fds(sock, RECORD_SIZE, 1)
        status = Record.decode(data).status
        if status:
            raise OSError(status, os.strerror(status))
        return socket.socket(fileno=fds[0])


def has_ended(sock: socket.socket) -> bool:
    """Return whether vsockd closes ``sock`` without another reply."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def assert_serves(fabric: PrivateFabric) -> None:
    """Check that vsockd serves others promptly, on both control sockets and to administrators."""
    for kind in SOCKET_TYPES:
        assert ask_once(fabric.host, LOCAL_CID, kind).local_cid == 2
    assert fabric.control.status()["pid"] == fabric.pid


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """Return the process's resident memory, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def state(pid: int) -> str:
    """Return the process's state, a letter of proc(5); "" for a missing process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def has_gone(pid: int) -> bool:
    """Return whether the process has exited, including as a zombie."""
    return state(pid) in ("", "Z")


@contextlib.contextmanager
def no_descriptor_left_behind(fabric: PrivateFabric) -> Iterator[None]:
    """Check that vsockd has no more descriptors after this context than before."""

    def count() -> int:
        fabric.control.status()  # vsockd probes for closed datagram sockets
        return descriptors(fabric.pid)

    before = count()
    yield
    wait_until(lambda: count() == before, f"vsockd to be back at {before} descriptors", PROMPT)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process within this context, so that it sees the effects only afterwards."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: state(pid) == "T", "the process to stop")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def compiled(source: str, folder: Path) -> Path:
    """Compile a C program of this folder into ``folder``."""
    program = folder / source.removesuffix(".c")
    path = Path(__file__).with_name(source)
    compile_c("-o", program, path)
    return program
