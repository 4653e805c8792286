"""Order of life-cycle events and streams at a device."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

import vsockets
from vsockets.control import Events
from vsockets.devices.client import ConnectRequest, DeviceClient, subscribe
from vsockets.devices.loop import DeviceLoop
from vsockets.model.buffers import BufferSizes
from vsockets.testing import PrivateFabric, wait_until

CID = 11


class Device:
    """A device's client and its events, without a running loop."""

    def __init__(self, fabric: PrivateFabric, events: Events) -> None:
        self.observed: list[str] = []
        self.events = events
        self.loop = DeviceLoop()
        self.attachment = DeviceClient(self.loop, fabric.control.attach_device(CID), CID)
        self.attachment.on_connect = self.on_connect
        self.requests: list[tuple[ConnectRequest, list[str]]] = []
        subscribe(
            self.loop, self.attachment, events, lambda cid, change: self.observed.append(change)
        )

    @property
    def listens(self) -> bool:
        return self.loop.watches(self.events.fileno())

    def on_connect(self, request: ConnectRequest) -> None:
        self.requests.append((request, list(self.observed)))


@pytest.fixture
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        fabric.control.add_context(CID)
        yield fabric


@pytest.fixture
def device(fabric: PrivateFabric) -> Iterator[Device]:
    with fabric.control.events("context") as events:
        device = Device(fabric, events)
        yield device
        device.attachment.close()
        device.loop.close()


def test_events_are_drained_before_the_guest_connects(
    fabric: PrivateFabric, device: Device
) -> None:
    fabric.control.migrate(CID)
    with contextlib.closing(device.attachment.connect(5000, (2, 5000), BufferSizes())):
        assert device.observed == ["migrate"]


def test_events_are_drained_before_a_connect_to_the_guest(
    fabric: PrivateFabric, device: Device
) -> None:
    fabric.control.migrate(CID)
    with vsockets.socket(context=fabric.host) as client:
        client.setblocking(False)
        client.connect_ex((CID, 5000))

        def request_arrived() -> bool:
            # The link alone: epoll may report it before the events.
            device.attachment.on_link_ready(0)
            return bool(device.requests)

        wait_until(request_arrived, "the connect request")
        (request, observed), *_ = device.requests
        assert observed == ["migrate"]
        assert isinstance(request.sock, socket.socket)
        request.sock.close()


def test_draining_without_events_does_not_wait(device: Device) -> None:
    device.attachment.drain_events()  # and does not wait
    assert device.observed == []


def test_draining_after_vsockd_has_ended(device: Device, fabric: PrivateFabric) -> None:
    fabric.stop()
    wait_until(lambda: device.attachment.drain_events() or not device.listens, "the end of events")
    device.attachment.drain_events()
    assert device.observed == []
