"""Fixtures of the library's tests."""

from __future__ import annotations

import contextlib
import os
import socket as stdlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.testing import PrivateFabric

#: An address chosen by the system.  Over a kernel's loopback (``tests/vm/test_library.py``), a
#: listener reports the CID it was bound to, and VMADDR_CID_ANY cannot be connected to.
ANY = (int(os.environ.get("VSOCKETS_TEST_CID", VMADDR_CID_ANY)), VMADDR_PORT_ANY)

STREAMS = (stdlib.SOCK_STREAM, stdlib.SOCK_SEQPACKET)


@pytest.fixture
def guest(vsock_fabric: PrivateFabric) -> vsockets.Attachment:
    """A guest of the test's fabric."""
    return vsock_fabric.guest()


@pytest.fixture
def host(vsock_fabric: PrivateFabric) -> vsockets.Attachment:
    """The host of the test's fabric."""
    return vsock_fabric.host


class Pair:
    """An established stream between a guest and the host, and the host's listener."""

    def __init__(
        self, host: vsockets.Attachment, guest: vsockets.Attachment, sock_type: int
    ) -> None:
        self.host, self.guest = host, guest
        self.server = vsockets.create_server(ANY, type=sock_type, context=host)
        self.client = vsockets.socket(type=sock_type, context=guest)
        self.client.connect(self.server.getsockname())
        self.accepted, self.peer = self.server.accept()
        for sock in (self.server, self.client, self.accepted):
            sock.settimeout(10)

    def close(self) -> None:
        """Close all three sockets."""
        for sock in (self.server, self.client, self.accepted):
            sock.close()


@pytest.fixture(params=STREAMS, ids=["stream", "seqpacket"])
def pair(
    request: pytest.FixtureRequest, host: vsockets.Attachment, guest: vsockets.Attachment
) -> Iterator[Pair]:
    """An established connection of each type."""
    made = Pair(host, guest, request.param)
    yield made
    made.close()


@pytest.fixture
def stream(host: vsockets.Attachment, guest: vsockets.Attachment) -> Iterator[Pair]:
    """An established stream."""
    made = Pair(host, guest, stdlib.SOCK_STREAM)
    yield made
    made.close()


@contextlib.contextmanager
def running(work: Callable[..., Any], *arguments: Any) -> Iterator[threading.Thread]:
    """Run ``work`` in a thread; join it, with a timeout, at the end."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work(*arguments)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(20)
    assert not thread.is_alive(), f"{work} still runs"
    if failures:
        raise failures[0]
