"""Descriptors passed along with data do not harm the programs of ``vsock``.

Each is sent a TCP socket that lingers: who closes it last waits for half a minute, unless it is
the sender.  Others are to be served meanwhile.
"""

from __future__ import annotations

import array
import contextlib
import re
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.attachment import Attachment
from vsockets.nfs import mount_protocol, rpc
from vsockets.perf.protocol import Header, MessageKind
from vsockets.testing import PrivateFabric

from .forwarding import ask
from .vsock import Running, Vsock

PROMPT = 10.0  # less than half a minute

NULL = rpc.encode_call(
    rpc.CallHeader(
        1, rpc.VERSION, mount_protocol.PROGRAM, mount_protocol.VERSION, 0, rpc.NO_AUTH, rpc.NO_AUTH
    ),
    b"",
)
PING = Header(MessageKind.PING, 1).encode()


@pytest.fixture(params=["this kernel", "older kernels"])
def vsock(fabric: PrivateFabric, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Vsock]:
    """Replace the module's fabric by one with and one without SO_PASSRIGHTS (Linux 6.16)."""
    modules = tmp_path / "modules"
    modules.mkdir()
    lines = ["import vsockets.amqp.limits as amqp, vsockets._linux.descriptor_passing as passing"]
    lines += [
        "amqp.AMQP_OPEN_TIMEOUT_SECONDS = amqp.AMQP_CLOSE_TIMEOUT_SECONDS = 0.5"
    ]  # no broker is running
    if request.param == "older kernels":
        lines += ["passing.refuse_descriptors = passing._refuses = lambda sock: False"]
    (modules / "sitecustomize.py").write_text("\n".join(lines))
    with Vsock(fabric.folder) as vsock:
        vsock.find_modules_in(modules)
        yield vsock


def pass_lingering(send: Callable[[list[tuple[int, int, array.array[int]]]], object]) -> None:
    """Call ``send`` with a message's ancillary data, and leave the descriptor to the receiver."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65_536))
    rights = array.array("i", [sock.fileno()])
    try:
        send([(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except PermissionError:  # the kernel refuses it
        peer.close()
    else:
        _held.append(peer)
    sock.close()


_held: list[socket.socket] = []


@pytest.fixture(autouse=True)
def held() -> Iterator[None]:
    """Keep sockets open until the end of the test."""
    yield
    for sock in _held:
        sock.close()
    _held.clear()


def attack(connect: Callable[[], socket.socket]) -> None:
    """Pass descriptors with the first byte, and with more data than is ever received."""
    for size, close in ((1, False), (1, False), (1 << 16, True)):
        sock = connect()
        sock.settimeout(PROMPT)
        pass_lingering(lambda rights, s=sock, n=size: s.sendmsg([bytes(n)], rights))  # type: ignore[misc]
        if close:
            sock.close()
        _held.append(sock)


def port_of(running: Running) -> int:
    line = running.error_line()
    found = re.search(r":(\d+)$", line)
    assert found, line
    return int(found[1])


def to_host(port: int, guest: Attachment) -> Callable[[], socket.socket]:
    return lambda: vsockets.create_connection((2, port), PROMPT, context=guest)


def test_forwarded_streams(vsock: Vsock, fabric: PrivateFabric, tcp_echo: int) -> None:
    running = vsock.start("forward", "--drain", 0, "vsock::any", f"tcp:127.0.0.1:{tcp_echo}")
    port = port_of(running)
    attack(to_host(port, fabric.guest()))
    assert ask(to_host(port, fabric.guest())()) == b"question"
    end_promptly(running)


def test_streams_of_a_target(vsock: Vsock, fabric: PrivateFabric) -> None:
    with vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=fabric.host) as server:
        target = f"vsock:2:{server.getsockname()[1]}"
        running = vsock.start("forward", "--drain", 0, "tcp:127.0.0.1:0", target)
        port = port_of(running)

        def connect() -> tuple[socket.socket, socket.socket]:
            pair = socket.create_connection(("127.0.0.1", port), PROMPT), server.accept()[0]
            _held.extend(pair)
            return pair

        (_, bad), (client, good) = connect(), connect()
        pass_lingering(lambda rights: bad.sendmsg([b"x"], rights))
        good.sendall(b"served")
        assert client.recv(100) == b"served"
    end_promptly(running)


def test_forwarded_unix_streams(vsock: Vsock, tcp_echo: int, tmp_path: Path) -> None:
    running = vsock.start(
        "forward", "--drain", 0, f"unix:{tmp_path}/s", f"tcp:127.0.0.1:{tcp_echo}"
    )
    assert running.error_line() == f"listening on unix:{tmp_path}/s"

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PROMPT)
        sock.connect(f"{tmp_path}/s")
        return sock

    attack(connect)
    assert ask(connect()) == b"question"
    end_promptly(running)


def test_a_proxys_clients(vsock: Vsock, fabric: PrivateFabric, tcp_echo: int) -> None:
    running = vsock.start(
        "forward", "--drain", 0, "vsock::any", "socks5:", "--allow-host", "127.0.0.1"
    )
    port = port_of(running)
    attack(to_host(port, fabric.guest()))
    with to_host(port, fabric.guest())() as sock:
        sock.sendall(b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01" + tcp_echo.to_bytes(2))
        sock.sendall(b"question")
        answer = b""
        while not answer.endswith(b"question"):
            piece = sock.recv(100)
            assert piece, answer
            answer += piece
    end_promptly(running)


def datagrams(
    running: Running, fabric: PrivateFabric, question: bytes, answered: bool = True
) -> None:
    """Attack a datagram service, and check that it still replies."""
    target = (2, port_of(running))

    def bound() -> vsockets.socket:
        sock = vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.guest())
        sock.settimeout(PROMPT)
        sock.sendto(question, target)
        return sock

    with bound() as attacker, bound() as good:
        route = attacker._routes[target]  # type: ignore[attr-defined]
        pass_lingering(lambda rights: route.sendmsg([question], rights))
        if answered:
            assert good.recv(70_000)
            good.sendto(question, target)
            assert good.recv(70_000)
    end_promptly(running)


def test_forwarded_datagrams(vsock: Vsock, fabric: PrivateFabric) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        running = vsock.start(
            "forward", "--drain", 0, "vsock-dgram::any", f"udp:127.0.0.1:{service.getsockname()[1]}"
        )
        datagrams(running, fabric, b"question", answered=False)


def test_nfs(vsock: Vsock, fabric: PrivateFabric, tmp_path: Path) -> None:
    export, state = tmp_path / "export", tmp_path / "state"
    export.mkdir()
    running = vsock.start(
        *("nfs", "serve", "--export", export, "--listen", "vsock-dgram::any", "--state", state)
    )
    datagrams(running, fabric, NULL)


def test_perf(vsock: Vsock, fabric: PrivateFabric) -> None:
    running = vsock.start("perf", "serve", "vsock-dgram::any")
    target = port_of(running)
    with vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.guest()) as sock:
        sock.settimeout(PROMPT)
        sock.sendto(PING, (2, target))
        assert sock.recv(100) == PING
        route = sock._routes[2, target]  # type: ignore[attr-defined]
        pass_lingering(lambda rights: route.sendmsg([PING], rights))
        sock.sendto(PING, (2, target))
        assert sock.recv(100) == PING


def test_amqp(vsock: Vsock, fabric: PrivateFabric) -> None:
    running = vsock.start(
        "amqp", "host-proxy", "--listen", "vsock::any", "--proxy", "tcp:127.0.0.1:1"
    )
    port = port_of(running)
    attack(to_host(port, fabric.guest()))
    with to_host(port, fabric.guest())() as good:
        assert good.recv(100)  # connection.close, as no broker is running
    end_promptly(running)


def test_listen(vsock: Vsock, fabric: PrivateFabric) -> None:
    running = vsock.start("listen", "any", "-k", "-d")
    port = port_of(running)
    attack(to_host(port, fabric.guest()))
    with to_host(port, fabric.guest())() as good:
        good.sendall(b"\nserved\n")
        while running.read_line().strip("\0") != "served":
            pass


def end_promptly(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(PROMPT)


PACKETS = """
import socket, sys
with socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET) as server:
    server.bind((2, socket.VMADDR_PORT_ANY))
    server.listen()
    print(f"port:{server.getsockname()[1]}", file=sys.stderr, flush=True)
    while True:
        with server.accept()[0] as client:
            client.send(client.recvmsg(100)[0])
"""


def test_packets_of_a_supervised_program(vsock: Vsock, fabric: PrivateFabric) -> None:
    """A descriptor ends a SOCK_SEQPACKET record, so the supervisor receives every record."""
    running = vsock.start("run", "--cid", "host", "--", sys.executable, "-c", PACKETS)
    port, guest = port_of(running), fabric.guest()

    def connect() -> vsockets.socket:
        sock = vsockets.socket(type=socket.SOCK_SEQPACKET, context=guest)
        _held.append(sock)
        sock.settimeout(PROMPT)
        sock.connect((2, port))
        return sock

    for _ in range(2):
        sock = connect()
        pass_lingering(lambda rights, s=sock: s.sendmsg([b"x"], rights))  # type: ignore[misc]
    sock = connect()
    sock.send(b"question")
    assert sock.recv(100) == b"question"
    end_promptly(running)
