"""The device, driven by a played guest."""

from __future__ import annotations

import socket

import pytest

from vsockets.testing.virtio_guest import connect

from .conftest import CID, Rig

HOST = (2, 5000)


def test_the_guest_learns_its_cid(rig: Rig) -> None:
    assert rig.guest().configured_cid() == CID


def test_a_guest_connects_and_both_sides_talk(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    stream = connect(rig.guest(), 1024, HOST)
    (sock,) = rig.host.accepted
    assert rig.host.asked == [(socket.SOCK_STREAM, 1024, HOST)]
    stream.send(b"from the guest")
    assert sock.recv(100) == b"from the guest"
    sock.send(b"from the host")
    assert stream.receive(13) == b"from the host"


def test_a_port_where_nobody_listens_is_refused_at_once(rig: Rig) -> None:
    guest = rig.guest()
    with pytest.raises(ConnectionResetError):
        connect(guest, 1024, HOST)
    assert not rig.device.links
