"""``vsock forward``: datagrams, with their boundaries and reply addresses."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import vsockets
from vsockets.testing import PrivateFabric

from .forwarding import end, start
from .vsock import PATIENCE, Vsock


def test_udp_to_vsock_keeps_boundaries_and_clients_apart(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as service,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        service.bind((2, vsockets.VMADDR_PORT_ANY))
        running, port = start(
            vsock, "udp:127.0.0.1:0", f"vsock-dgram:local:{service.getsockname()[1]}", "-v"
        )
        for sock in (service, one, other):
            sock.settimeout(PATIENCE)
        sources = {}
        for sock, name in ((one, b"one"), (other, b"other")):
            sock.connect(("127.0.0.1", port))
            for data in (name, b"", name * 1000):
                sock.send(data)
            for data in (name, b"", name * 1000):
                received, sources[name] = service.recvfrom(70_000)
                assert received == data
        assert sources[b"one"] != sources[b"other"]
        for name, source in sources.items():
            service.sendto(b"to " + name, source)
        assert one.recv(100) == b"to one"
        assert other.recv(100) == b"to other"
        text = end(running)
        assert text.count("3 datagrams sent, 1 received, 0 dropped") == 2


def test_vsock_datagrams_to_udp_and_unix(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    guest = fabric.guest()
    # The first address of the name, which may be ::1.
    family, _, _, _, address = socket.getaddrinfo("localhost", 0, type=socket.SOCK_DGRAM)[0]
    with (
        socket.socket(family, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix,
    ):
        udp.bind(address)
        unix.bind(str(tmp_path / "s"))
        targets = {
            udp: f"udp:localhost:{udp.getsockname()[1]}",
            unix: f"unix-dgram:{tmp_path}/s",
        }
        for service, target in targets.items():
            service.settimeout(PATIENCE)
            running, port = start(vsock, "vsock-dgram::any", target, "--allow", guest.cid)
            with vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as client:
                client.settimeout(PATIENCE)
                for data in (b"ping", b"x" * 60_000):
                    client.sendto(data, (2, port))
                    received, source = service.recvfrom(70_000)
                    assert received == data
                    service.sendto(b"pong", source)
                    assert client.recvfrom(100) == (b"pong", (2, port))
            end(running)


def test_flows_end_when_idle_and_when_there_are_too_many(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        contextlib.ExitStack() as stack,
    ):
        service.bind(("127.0.0.1", 0))
        service.settimeout(PATIENCE)
        running, port = start(
            *(vsock, "udp:127.0.0.1:0", f"udp:127.0.0.1:{service.getsockname()[1]}"),
            *("-v", "--max-connections", 2, "--idle", 1),
        )
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.sendto(b"x", ("127.0.0.1", port))
            service.recvfrom(10)
        for _ in range(3):  # one for the third client, two idle
            assert "1 datagrams sent, 0 received" in running.error_line()
        end(running)
