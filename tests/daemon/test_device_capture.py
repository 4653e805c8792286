"""Capture requests to vsockd: who may capture, and what the device receives."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.attachment import Attachment
from vsockets.capture import open_capture
from vsockets.limits import CAPTURE_PAYLOAD_MAX_BYTES
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, Role
from vsockets.testing import PrivateFabric

from .users import NOBODY, as_root, ask_by_program

CID = 9


@pytest.fixture
def link(fabric: PrivateFabric) -> Iterator[socket.socket]:
    """Yield the link of a device of context 9."""
    fabric.guest(CID)
    with fabric.control.attach_device(CID) as link:
        link.settimeout(10)
        yield link


def told(link: socket.socket) -> tuple[Record, socket.socket]:
    data, fds, _, _ = socket.recv_fds(link, RECORD_SIZE, 1)
    return Record.decode(data), socket.socket(fileno=fds[0])


def refusal(place: Attachment, cid: int) -> int:
    with pytest.raises(OSError) as refused:
        open_capture(place, cid)
    assert refused.value.errno is not None
    return refused.value.errno


def test_device_and_client_get_one_end_each(fabric: PrivateFabric, link: socket.socket) -> None:
    with open_capture(fabric.host, CID, limit=100, port=5000) as records:
        record, device_end = told(link)
        assert (record.role, record.size, record.local) == (Role.CAPTURE, 100, (CID, 5000))
        with device_end:
            device_end.send(b"a record")
            assert records.recv(100) == b"a record"
        assert records.recv(100) == b""  # no other process has the device's end


def test_the_payload_limit_is_capped(fabric: PrivateFabric, link: socket.socket) -> None:
    with open_capture(fabric.host, CID, limit=1 << 40):
        record, device_end = told(link)
        device_end.close()
    assert record.size == CAPTURE_PAYLOAD_MAX_BYTES


def test_a_guest_without_a_device_is_refused(fabric: PrivateFabric) -> None:
    fabric.guest(CID)
    assert refusal(fabric.host, CID) == errno.ENOTSUP
    assert refusal(fabric.host, 2) == errno.ENOTSUP
    assert refusal(fabric.host, 77) == errno.ENOENT


def test_a_guest_is_denied_and_the_denial_is_logged(
    fabric: PrivateFabric, link: socket.socket
) -> None:
    guest = fabric.guest()
    with fabric.control.events("denial") as events:
        for cid in (CID, guest.cid, 77):  # not even whether there is one
            assert refusal(guest, cid) == errno.EACCES
        event = events.wait(10)
    assert (event["rule"], event["operation"], event["errno"]) == ("capture", "capture", "EACCES")
    assert event["context"] == guest.cid
    assert event["destination"][0] == CID


@as_root
def test_another_user_needs_a_grant(
    fabric: PrivateFabric, link: socket.socket, programs: Path
) -> None:
    question = Request(Op.CAPTURE, peer_cid=CID, size=100)
    client = programs / "request_client"
    assert ask_by_program(client, fabric, question).status == errno.EACCES
    (fabric.configuration / "grants.toml").write_text(
        f"[[grant]]\nuser = {NOBODY}\ncapture = true\n"
    )
    fabric.control.reload()
    assert ask_by_program(client, fabric, question).status == 0
    _, device_end = told(link)
    with device_end:  # the client has closed its end
        assert device_end.recv(1) == b""
