"""``vsock forward``: no guest can take the share of another."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import vsockets
from vsockets.attachment import Attachment
from vsockets.testing import PrivateFabric

from .forwarding import ask, end, start
from .vsock import PATIENCE, Vsock

#: Replaces getaddrinfo(): name servers of .silent never reply.
_NAME_SERVERS = """
import socket, threading
real = socket.getaddrinfo

def getaddrinfo(host, port, **options):
    numeric = options.get("flags", 0) & socket.AI_NUMERICHOST
    if host.endswith(".silent") and not numeric:
        threading.Event().wait()
    return real("127.0.0.1" if host == "good.test" and not numeric else host, port, **options)

socket.getaddrinfo = getaddrinfo
"""


def connect(guest: Attachment, port: int) -> vsockets.socket:
    sock = vsockets.create_connection((2, port), PATIENCE, context=guest)
    sock.settimeout(PATIENCE)
    return sock


def test_connections(vsock: Vsock, fabric: PrivateFabric, tcp_echo: int) -> None:
    greedy, other = fabric.guest(), fabric.guest()
    target = f"tcp:127.0.0.1:{tcp_echo}"
    running, port = start(vsock, "vsock::any", target, "--max-connections", 8)
    with contextlib.ExitStack() as stack:
        for number in range(12):
            sock = stack.enter_context(connect(greedy, port))
            if number < 4:
                sock.sendall(b"x")
            assert sock.recv(1) == (b"x" if number < 4 else b"")
        assert ask(connect(other, port)) == b"question"
        line = running.error_line()
        assert line.endswith(f"context {greedy.cid}: its share of the connections is in use")
    end(running)


def test_a_guest_that_has_a_forward_for_itself_has_all_connections(
    vsock: Vsock, fabric: PrivateFabric, tcp_echo: int
) -> None:
    guest = fabric.guest()
    running, port = start(
        *(vsock, "vsock::any", f"tcp:127.0.0.1:{tcp_echo}"),
        *("--max-connections", 8, "--allow", guest.cid),
    )
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(connect(guest, port))
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
    end(running)


def test_names(vsock: Vsock, fabric: PrivateFabric, tcp_echo: int, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NAME_SERVERS)
    vsock.find_modules_in(tmp_path)
    greedy, other = fabric.guest(), fabric.guest()
    running, port = start(
        *(vsock, "vsock::any", "http-proxy:"),
        *("--allow-host", "*.silent:443", "--allow-host", f"good.test:{tcp_echo}"),
        *("--drain", 0),
    )
    with contextlib.ExitStack() as stack:
        for number in range(200):
            sock = stack.enter_context(connect(greedy, port))
            sock.sendall(b"CONNECT n%d.silent:443 HTTP/1.1\r\nHost: x\r\n\r\n" % number)
        with connect(other, port) as sock:
            sock.sendall(b"CONNECT good.test:%d HTTP/1.1\r\nHost: x\r\n\r\n" % tcp_echo)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    running.process.kill()


def test_flows_of_datagrams(vsock: Vsock, fabric: PrivateFabric) -> None:
    greedy, other = fabric.guest(), fabric.guest()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        vsockets.socket(type=socket.SOCK_DGRAM, context=other) as patient,
    ):
        service.bind(("127.0.0.1", 0))
        for sock in (service, patient):
            sock.settimeout(PATIENCE)
        running, port = start(
            *(vsock, "vsock-dgram::any", f"udp:127.0.0.1:{service.getsockname()[1]}"),
            *("--max-connections", 4),
        )
        patient.sendto(b"question", (2, port))
        _, source = service.recvfrom(100)
        for _ in range(10):
            with vsockets.socket(type=socket.SOCK_DGRAM, context=greedy) as sock:
                sock.sendto(b"x", (2, port))
                assert service.recvfrom(100)[0] == b"x"
        service.sendto(b"late answer", source)
        assert patient.recv(100) == b"late answer"
        end(running)
