"""The host's side of tests: listen and connect to guest programs, and compare echoed data."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from typing import Any

import vsockets
from vsockets import AF_VSOCK
from vsockets.testing import wait_until

from .machine import Job, Machine

MIB = 1 << 20
PATIENCE = 30.0


def datagram(machine: Machine, port: int = vsockets.VMADDR_PORT_ANY) -> vsockets.socket:
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=machine.host)
    sock.bind((2, port))
    sock.settimeout(PATIENCE)
    return sock


def serve(machine: Machine) -> tuple[Any, int]:
    server = vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=machine.host)
    server.settimeout(PATIENCE)
    return server, server.getsockname()[1]


def dial(machine: Machine, port: int) -> Any:
    """Connect to a guest program that is about to listen."""

    found = []

    def connects() -> bool:
        try:
            found.append(vsockets.create_connection((machine.cid, port), context=machine.host))
        except ConnectionResetError:
            return False
        return True

    wait_until(connects, f"the guest to listen on {port}", PATIENCE)
    found[0].settimeout(PATIENCE)
    return found[0]


def has_virtio_device(machine: Machine) -> bool:
    """Return whether the guest's driver has a virtio device."""
    drivers = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"
    names = machine.run("import os; result = os.listdir(drivers)", drivers=drivers)
    return any(name.startswith("virtio") for name in names)


def echo_one_stream(machine: Machine, port: int) -> Job:
    """Start a guest program that listens before this returns and echoes one stream."""
    machine.run("import sys; sys.listening = listener(port)", port=port)
    return machine.start("import sys; result = echo(sys.listening.accept()[0])")


def exchange(sock: Any, total: int) -> bool:
    """Send ``total`` random bytes to an echo server; return whether the same bytes came back."""
    block = os.urandom(MIB)
    sent, received = hashlib.blake2b(), hashlib.blake2b()

    def send() -> None:
        for at in range(0, total, MIB):
            part = block[: min(MIB, total - at)]
            sent.update(part)
            sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    count = 0
    while data := sock.recv(MIB):
        received.update(data)
        count += len(data)
    sender.join()
    return count == total and sent.digest() == received.digest()
