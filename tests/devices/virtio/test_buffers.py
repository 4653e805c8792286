"""Credit of a guest when programs of the host have larger buffers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from support.vmci_driver import StubFabric
from vsockets.devices.limits import (
    VIRTIO_BUFFER_BYTES,
    VIRTIO_ENLARGED_BUFFER_MAX_BYTES,
    VIRTIO_ENLARGED_BUFFERS_MAX,
)
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.virtio.connection import ConnectionState, PendingTx, VirtioConnection
from vsockets.devices.virtio.machine import VirtioMachine
from vsockets.devices.virtio.packet import Type

PEER = (2, 5000)


class Machine:
    """A machine whose guest has connections already."""

    def __init__(self) -> None:
        self.fabric = StubFabric(DeviceLoop())
        self._machine = VirtioMachine(DeviceLoop(), self.fabric, 3)  # type: ignore[arg-type]

    def connection(
        self, port: int, state: ConnectionState = ConnectionState.ESTABLISHED
    ) -> VirtioConnection:
        connection = VirtioConnection(state, Type.STREAM, PEER, port, VIRTIO_BUFFER_BYTES)
        self._machine.device.connections[*PEER, port] = connection
        return connection

    def resized(self, port: int, size: int) -> None:
        """Report a program's new buffer size as vsockd does."""
        self.fabric.on_resized(port, PEER, size)

    def close(self) -> None:
        self._machine.device.connections.clear()
        self._machine.device.close()
        self.fabric.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def test_larger_buffer_gives_more_credit(machine: Machine) -> None:
    connection = machine.connection(700)
    machine.resized(700, 1 << 20)
    assert connection.receive.size == 1 << 20
    assert connection.pending_tx & PendingTx.CREDIT
    assert connection.on_payload(1 << 20) and not connection.on_payload(1)


def test_buffer_is_enlarged_before_the_response(machine: Machine) -> None:
    """The host's program sets its buffer before the RESPONSE, which then has the credit."""
    connection = machine.connection(700, ConnectionState.PEER_INIT)
    machine.resized(700, 1 << 20)
    assert connection.receive.size == 1 << 20 and not connection.pending_tx
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        connection.accept()
        marker = os.open(os.devnull, os.O_PATH)
        connection.attach(ours, marker)
        os.close(marker)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > before


def test_credit_never_shrinks(machine: Machine) -> None:
    connection = machine.connection(700)
    machine.resized(700, 4096)
    assert connection.receive.size == VIRTIO_BUFFER_BYTES and not connection.pending_tx


def test_buffer_size_is_limited(machine: Machine) -> None:
    connection = machine.connection(700)
    machine.resized(700, 1 << 40)
    assert connection.receive.size == VIRTIO_ENLARGED_BUFFER_MAX_BYTES


def test_guest_with_many_connections_gets_no_larger_buffers(machine: Machine) -> None:
    connections = [machine.connection(port) for port in range(VIRTIO_ENLARGED_BUFFERS_MAX + 1)]
    machine.resized(0, 1 << 20)
    assert connections[0].receive.size == VIRTIO_BUFFER_BYTES


def test_resize_of_a_closed_connection_is_ignored(machine: Machine) -> None:
    machine.resized(700, 1 << 20)
