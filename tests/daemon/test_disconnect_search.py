"""The search for streams that must end, among any number of descriptors."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from vsockets.daemon.scheduling import DeferredWork
from vsockets.daemon.stream_liveness import Group
from vsockets.daemon.streams import Disconnector
from vsockets.eventloop.loop import EventLoop
from vsockets.fabric import Connection, Credentials, Endpoint, EndpointKind, Fabric
from vsockets.model.buffers import BufferSizes

from .raw_client import send_with

ME = Credentials(os.getpid(), os.getuid(), os.getgid())


def stream(fabric: Fabric, accepted: socket.socket) -> Connection:
    """Return a stream between two sockets of this process, as vsockd records it."""
    host = fabric.contexts.host
    listener = Endpoint(EndpointKind.STREAM, host, host.cid, 5000, ME, listening=True)
    connection = fabric.connect(host, listener, None, BufferSizes(), ME)
    group = Group()
    group.add(accepted.fileno(), connection.number)
    connection.watch = group
    return connection


class HiddenStream(NamedTuple):
    """A stream that is to be ended, and whose accepting end is in a message between processes."""

    disconnector: Disconnector
    mine: socket.socket  #: the connecting end
    hidden: socket.socket  #: the message waits here


@contextlib.contextmanager
def hidden_stream(is_held: bool) -> Iterator[HiddenStream]:
    """Yield a stream beside 640 other descriptors: of its connecting end if ``is_held``."""
    fabric = Fabric(0)
    disconnector = Disconnector(loop := EventLoop(), DeferredWork(loop), fabric.end)
    mine, accepted = socket.socketpair()
    hiding, hidden = socket.socketpair()
    with contextlib.ExitStack() as stack:
        for sock in (mine, accepted, hiding, hidden):
            stack.enter_context(sock)
        connection = stream(fabric, accepted)
        send_with(hiding, b"x", [accepted.fileno()])
        accepted.close()
        for _ in range(640):
            stack.callback(os.close, os.dup((mine if is_held else hiding).fileno()))
        disconnector._remaining[connection.number] = connection
        yield HiddenStream(disconnector, mine, hidden)


def test_the_search_continues_in_steps() -> None:
    """The search for a hidden stream visits all descriptors."""
    with hidden_stream(is_held=True) as (disconnector, mine, hidden):
        assert len(list(disconnector._try())) >= 10
        # Once it is in a process again it is found, and its search is over.
        _, (fd,), _, _ = socket.recv_fds(hidden, 1, 1)
        list(disconnector._try())
        os.close(fd)
        assert disconnector.remaining == []
        assert mine.recv(1) == b""


@pytest.mark.parametrize("end", ["accepting", "connecting"])
def test_a_stream_that_ends_during_the_search_is_not_left(end: str) -> None:
    """No process has that end then, so the search cannot find it."""
    with hidden_stream(is_held=False) as (disconnector, mine, hidden):
        search = disconnector._try()
        next(search)
        if end == "accepting":
            hidden.close()  # with the message and the descriptor in it
        else:
            mine.close()
        list(search)
        assert disconnector.remaining == []


def test_a_visible_stream_is_disconnected_at_once() -> None:
    fabric = Fabric(0)
    disconnector = Disconnector(loop := EventLoop(), DeferredWork(loop), fabric.end)
    mine, accepted = socket.socketpair()
    with mine, accepted:
        assert disconnector.disconnect([stream(fabric, accepted)]) == []
        assert mine.recv(1) == b""
