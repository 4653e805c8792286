"""Use each part of the product in one container; ``test_services.py`` runs it there."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import vsockets
from vsockets.testing import PrivateFabric

VSOCK = (sys.executable, "-m", "vsockets.cli")
HYBRID, MONITOR = "/tmp/guest.sock", "/tmp/monitor.sock"


def answer(sock: Any) -> None:
    """Send what a client sends back in capitals, once."""
    with sock:
        sock.sendall(sock.recv(100).upper())


def serve(listener: Any) -> None:
    """Serve the clients of a listening socket until it is closed."""

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                answer(listener.accept()[0])

    threading.Thread(target=run, daemon=True).start()


def ask(sock: Any, question: bytes) -> None:
    """Check the answer to a question."""
    with sock:
        sock.settimeout(20)
        sock.sendall(question)
        assert sock.recv(100) == question.upper(), question


def unix_listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener


def use_library(fabric: PrivateFabric, guest: vsockets.Attachment) -> None:
    """Streams and datagrams from a guest to the host."""
    ask(vsockets.create_connection((2, 5000), context=guest), b"library")
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as receiver,
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sender,
    ):
        receiver.settimeout(20)
        receiver.bind((2, 6000))
        sender.sendto(b"datagram", (2, 6000))
        data, source = receiver.recvfrom(100)
        assert (data, source[0]) == (b"datagram", guest.cid)


def use_forwarder(fabric: PrivateFabric) -> None:
    """A TCP port of the container that leads to a guest's port."""
    command = (*VSOCK, "forward", "tcp:127.0.0.1:0", "vsock:5:5052")
    with subprocess.Popen(
        command, env=fabric.environment(fabric.host), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rpartition(":")[2])
        ask(socket.create_connection(("127.0.0.1", port)), b"forwarder")
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log


def use_hybrid_socket(guest: vsockets.Attachment) -> None:
    """The unix sockets of a guest, in both directions."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(HYBRID)
        sock.sendall(b"CONNECT 5052\n")
        assert sock.recv(100).startswith(b"OK ")
        ask(sock, b"hybrid")
    with unix_listener(f"{HYBRID}_7000") as listener:
        serve(listener)
        ask(vsockets.create_connection((2, 7000), context=guest), b"relay")


def use_hybrid_device(fabric: PrivateFabric) -> None:
    """``vsock device hybrid``, with this process as Firecracker."""
    with unix_listener(MONITOR) as monitor:

        def play() -> None:
            sock, _ = monitor.accept()
            assert sock.recv(100) == b"CONNECT 52\n"
            sock.sendall(b"OK 1\n")
            answer(sock)

        threading.Thread(target=play, daemon=True).start()
        command = (*VSOCK, "device", "hybrid", "--cid", "9", "--socket", MONITOR)
        with subprocess.Popen(
            command, env=fabric.environment(fabric.host), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "9\n"
            ask(vsockets.create_connection((9, 52), context=fabric.host), b"device")
            process.terminate()


def main() -> None:
    with PrivateFabric() as fabric:
        guest = fabric.guest(5, hybrid=HYBRID)
        with (
            vsockets.create_server((2, 5000), context=fabric.host) as host_server,
            vsockets.create_server((5, 5052), context=guest) as guest_server,
        ):
            serve(host_server)
            serve(guest_server)
            use_library(fabric, guest)
            use_forwarder(fabric)
            use_hybrid_socket(guest)
            use_hybrid_device(fabric)
            stream = vsockets.create_connection((2, 5000), context=guest)
            with stream:
                stream.settimeout(20)
                assert fabric.control.suspend(5)["streams_left"] == []
                assert stream.recv(1) == b""
    print(f"all parts work for user {os.getuid()}")


if __name__ == "__main__":
    main()
