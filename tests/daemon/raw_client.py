"""Talking to vsockd byte by byte, past the library, as a hostile program would."""

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

#: The guest of the fabric that tests share.
GUEST = 3

#: The two kinds of control socket a context has.
DOORS = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]

#: How long vsockd may take to answer when nothing holds it up, in seconds: on a busy machine, too.
PROMPT = 10.0


def enter(context: Attachment, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A connection to a context's control socket on which nothing was said yet."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(PROMPT)
    try:
        sock.connect(os.fspath(context.folder / _NAMES[socket.SocketKind(kind)]))
    except BaseException:
        sock.close()
        raise
    return sock


def guest_of(fabric: PrivateFabric) -> Attachment:
    """The guest of the fabric that tests share."""
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
    """Send ``data`` with descriptors riding along."""
    rights = array.array("i", descriptors)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def cookie_of(sock: socket.socket) -> int:
    """The kernel's number for a socket."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


def unix_datagrams() -> socket.socket:
    """What a vSockets datagram socket is made of, before it is one."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def adopt(context: Attachment, datagrams: socket.socket, port: int = ANY) -> Record:
    """Have vsockd bind a datagram socket, in the orderly way."""
    with enter(context, socket.SOCK_SEQPACKET) as sock:
        send_with(sock, bind_datagram(port).encode(), [datagrams.fileno()])
        return Record.decode(sock.recv(RECORD_SIZE))


def ask_for_route(
    context: Attachment, sender: socket.socket, address: tuple[int, int]
) -> socket.socket:
    """The way from a datagram socket to ``address``, in the orderly way.

    OSError with vsockd's errno when there is none.
    """
    with enter(context, socket.SOCK_SEQPACKET) as sock:
        send_with(sock, route(*address).encode(), [sender.fileno()])
        data, fds, _, _ = socket.recv_fds(sock, RECORD_SIZE, 1)
        status = Record.decode(data).status
        if status:
            raise OSError(status, os.strerror(status))
        return socket.socket(fileno=fds[0])


def has_ended(sock: socket.socket) -> bool:
    """Whether vsockd closes ``sock``, without having said anything more."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def assert_serves(fabric: PrivateFabric) -> None:
    """vsockd answers others, promptly, on both control sockets and to its administrator."""
    for kind in DOORS:
        assert ask_once(fabric.host, LOCAL_CID, kind).local_cid == 2
    assert fabric.control.status()["pid"] == fabric.pid


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """The process's resident memory, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def state(pid: int) -> str:
    """The process's state, a letter of proc(5); "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def has_gone(pid: int) -> bool:
    """Whether the process has ended, be it that nobody has asked for its status yet."""
    return state(pid) in ("", "Z")


@contextlib.contextmanager
def no_descriptor_left_behind(fabric: PrivateFabric) -> Iterator[None]:
    """Within this context vsockd may hold more descriptors than before; afterwards not."""

    def count() -> int:
        fabric.control.status()  # vsockd looks for datagram sockets that have gone
        return descriptors(fabric.pid)

    before = count()
    yield
    wait_until(lambda: count() == before, f"vsockd to be back at {before} descriptors", PROMPT)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process, so that all that happens within the context has happened before it looks."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: state(pid) == "T", "the process to stop")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def compiled(source: str, folder: Path) -> Path:
    """A C program of this folder, made in ``folder``."""
    program = folder / source.removesuffix(".c")
    path = Path(__file__).with_name(source)
    compile_c("-o", program, path)
    return program
