"""An administrator disconnects one stream: only that one, in any process, and it is logged."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .guest_changes import Machine, assert_ended, assert_stands, machine, stream
from .raw_client import PROMPT


@pytest.fixture
def guest(shared_fabric: PrivateFabric) -> Iterator[Machine]:
    with machine(shared_fabric) as guest:
        yield guest


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("begun_by", ["guest", "host"])
def test_only_the_named_stream_is_disconnected(
    shared_fabric: PrivateFabric, guest: Machine, kind: int, begun_by: str
) -> None:
    sides = shared_fabric.host, guest.context
    listening, connecting = sides if begun_by == "guest" else reversed(sides)
    with (
        stream(listening, connecting, kind) as (accepted, connected),
        stream(listening, connecting, kind) as others,
    ):
        ends = connected.getsockname(), connected.getpeername()
        assert shared_fabric.control.disconnect(*ends) == {"streams_left": []}
        assert_ended(accepted)
        assert_ended(connected)
        assert_stands(*others)
        ports = {row["port"] for row in shared_fabric.control.sockets()}
        assert not ports & {port for _, port in ends}


def test_addresses_in_either_order(shared_fabric: PrivateFabric, guest: Machine) -> None:
    with stream(shared_fabric.host, guest.context) as (accepted, connected):
        shared_fabric.control.disconnect(accepted.getsockname(), accepted.getpeername())
        assert_ended(connected)


def test_within_one_context(shared_fabric: PrivateFabric, guest: Machine) -> None:
    """The connecting end is bound to the local CID, which does not identify its context."""
    with (
        vsockets.create_server((5, 5000), context=guest.context) as server,
        vsockets.socket(context=guest.context) as connected,
    ):
        connected.bind((vsockets.VMADDR_CID_LOCAL, vsockets.VMADDR_PORT_ANY))
        connected.connect((5, 5000))
        accepted, _ = server.accept()
        with accepted:
            for row in shared_fabric.control.sockets():
                if row["state"] == "established" and not row["accepted"]:
                    shared_fabric.control.disconnect((row["cid"], row["port"]), row["peer"])
            assert_ended(accepted)
            assert_ended(connected)


def test_an_unknown_stream_is_refused(shared_fabric: PrivateFabric, guest: Machine) -> None:
    with stream(shared_fabric.host, guest.context) as (accepted, connected):
        local, peer = connected.getsockname(), connected.getpeername()
        for one, other in (
            (local, (2, peer[1] ^ 1)),
            ((local[0], local[1] ^ 1), peer),
            ((6, local[1]), peer),  # no such context
            (peer, peer),
        ):
            with pytest.raises(OSError, match="no stream between") as caught:
                shared_fabric.control.disconnect(one, other)
            assert caught.value.errno == errno.ENOENT
        assert_stands(accepted, connected)
        shared_fabric.control.disconnect(local, peer)
        with pytest.raises(OSError, match="no stream between"):
            shared_fabric.control.disconnect(local, peer)


@pytest.mark.parametrize(
    "address", [None, 3, [], [3], [3, 1, 1], ["3", 1], [3, -1], [3, 2**32], {"cid": 3}]
)
def test_invalid_addresses_are_refused(shared_fabric: PrivateFabric, address: Any) -> None:
    ask = shared_fabric.control._request
    with pytest.raises(OSError, match="peer: expected") as caught:
        ask("stream.disconnect", local=[2, 5000], peer=address)
    assert caught.value.errno == errno.EINVAL


def test_it_is_logged(shared_fabric: PrivateFabric, guest: Machine) -> None:
    with (
        shared_fabric.control.events("disconnect") as events,
        stream(shared_fabric.host, guest.context) as (_, connected),
    ):
        local, peer = connected.getsockname(), connected.getpeername()
        shared_fabric.control.disconnect(local, peer)
        event = events.wait(PROMPT)
    assert (event["source"], event["destination"]) == (list(local), list(peer))
    assert (event["pid"], event["uid"]) == (os.getpid(), os.geteuid())
    words = "disconnected: {}:{} to {}:{}; requested by pid {}"
    assert words.format(*local, *peer, os.getpid()) in shared_fabric.log


def test_only_the_fabrics_owner_may_ask(shared_fabric: PrivateFabric) -> None:
    """The request comes over the administrator's socket, which admits no other user."""
    assert stat.S_IMODE((shared_fabric.folder / "control").stat().st_mode) == 0o600
