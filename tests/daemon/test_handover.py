"""The state that a vsockd hands to its successor: in parts, and in the format before."""

from __future__ import annotations

import contextlib
import gc
import marshal
import os
import signal
import socket
import threading
from typing import Any

import pytest

from vsockets.daemon import earlier_format, succession
from vsockets.daemon.admin.audit import Audit, Events
from vsockets.daemon.broker import Broker
from vsockets.daemon.channel import Channel
from vsockets.daemon.credentials import peer_credentials
from vsockets.daemon.handover import (
    Reader,
    Writer,
    restore_endpoint,
    restore_fabric,
    save_endpoint,
    save_fabric,
)
from vsockets.daemon.scheduling import DeferredWork
from vsockets.daemon.streams import Streams
from vsockets.eventloop.loop import EventLoop
from vsockets.fabric import Connection, Context, Credentials, Endpoint, EndpointKind, Fabric
from vsockets.model.buffers import BufferSizes
from vsockets.protocol import RECORD_SIZE, client

SIZES = BufferSizes()


def test_streams_that_change_after_they_were_sent() -> None:
    """vsockd sends its streams to its successor, and serves on before the rest."""
    fabric, loop = Fabric(0), EventLoop()
    guest, owner = fabric.contexts.add(None, "", 0), Credentials(1, 0, 0)
    streams = Streams(loop, fabric, DeferredWork(loop))
    streams.open()
    listener, asked = (
        Endpoint(EndpointKind.STREAM, fabric.contexts.host, 2, port, owner, listening=True)
        for port in (5000, 5001)
    )
    asked.pending = True
    with contextlib.ExitStack() as stack:

        def connect(listener: Endpoint) -> Connection:
            ours, _ = (stack.enter_context(end) for end in socket.socketpair())
            one = fabric.connect(guest, listener, None, BufferSizes(), owner, ours.fileno())
            one.watch = streams.add(ours.fileno(), one.number)
            return one

        stays, ended = connect(listener), connect(listener)
        connect(asked)
        writer = Writer(fabric)
        groups = streams.save_groups(writer)
        early = streams.save_early(writer, list(fabric.connections.values()))
        assert [row[0] for row in early] == [stays.number, ended.number]
        endpoints = {number: save_endpoint(writer, one) for one, number in writer.endpoints.items()}

        other = Fabric(0)
        restore_fabric(other, save_fabric(fabric, writer.early))
        reader = Reader(other, [os.dup(fd) for fd in writer.take_descriptors()])
        restored = Streams(loop, other, DeferredWork(loop))
        restored.restore_groups(reader, groups)
        reader.endpoints.update(
            (number, restore_endpoint(reader, one)) for number, one in endpoints.items()
        )
        restored.restore_connections(reader, early)

        fabric.end(ended.number)
        connect(listener)
        saved = streams.save(writer)
        assert len(saved["connections"]) == 2
        assert not writer.take_descriptors()  # the registrations are in the same epoll
        (number,) = (number for one, number in writer.endpoints.items() if one is asked)
        reader.endpoints[number] = restore_endpoint(reader, save_endpoint(writer, asked))
        restored.end(saved["ended"])
        restored.restore(reader, saved)

        assert state_of(other) == state_of(fabric)
        restored.reap()
        assert restored.inodes().keys() == fabric.connections.keys() | {ended.number}


def state_of(fabric: Fabric) -> object:
    """Return what a fabric knows of its streams."""
    context = fabric.contexts.require(3)
    connections = {
        one.number: (one.local, one.peer, one.size, one.listener.port, type(one.watch))
        for one in fabric.connections.values()
    }
    return connections, set(context.connected), set(context.cookies), context.party_of(0).sockets


class Served:
    """A broker with a guest, and the sockets of its clients."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.loop = EventLoop()
        self.fabric = Fabric(os.geteuid())
        self.broker = Broker(self.loop, self.fabric, Audit(Events(), 1))
        self._enter = stack.enter_context
        for context in self.fabric.contexts:
            stack.callback(self.broker.close_context, context)

    def ask(self, context: Context, *requests: bytes) -> socket.socket:
        """Have the broker serve requests of one client; return its socket, with a reply."""
        ours, theirs = socket.socketpair()
        self._enter(ours).settimeout(10)
        channel = Channel(theirs, context, EndpointKind.STREAM, peer_credentials(theirs))
        ours.send(requests[0])
        self.broker.serve_first(channel)
        for request in requests[1:]:
            ours.recv(RECORD_SIZE)
            ours.send(request)
            self.broker.serve_kept(channel)
        return ours


def in_format_4(state: dict[str, Any], early: list[Any]) -> dict[str, Any]:
    """Return a state without parts in advance, as format 4 had it beside rows of streams."""
    del state["removed"], state["dropped"]
    streams = state["served"]["streams"]
    known = {row[0] for row in early}
    streams["connections"] = [row for row in streams["connections"] if row[0] not in known]
    liveness = streams["liveness"]
    del liveness["order"]
    groups = liveness["groups"].items()
    liveness["inodes"] = [pair for _, group in groups for pair in group["inodes"]]
    for _, group in groups:
        group["inodes"] = [inode for inode, _ in group["inodes"]]
    liveness["groups"] = list(groups)
    return {**state, "is_held": False}


def hand_over(sock: socket.socket, rows: list[Any], state: Any, fds: list[int]) -> None:
    """Play a vsockd of format 4."""

    def send(message: bytes, content: Any) -> None:
        file = os.memfd_create("state")
        with open(file, "r+b") as opened:
            opened.write(marshal.dumps(content, 4))
            opened.seek(0)
            socket.send_fds(sock, [message], [file])

    assert sock.recv(64) == b"ready 4"
    send(b"rows", rows)
    assert sock.recv(64) == b"read"
    send(b"%d" % len(fds), state)
    socket.send_fds(sock, [b"d"], fds)
    assert sock.recv(64) == b"taken"
    sock.send(b"go")


def test_state_of_the_format_before_is_taken_over() -> None:
    with contextlib.ExitStack() as stack:
        old = Served(stack)
        old.broker.streams.open()
        guest, host = old.fabric.contexts.add(3, "", 0), old.fabric.contexts.host
        bind = client.bind((2, 5000), sizes=SIZES, cookie=1)
        listener = old.ask(host, bind, client.listen(8, SIZES))
        listener.recv(RECORD_SIZE)
        for cookie in (2, 3, 4):
            old.ask(guest, client.connect((2, 5000), SIZES, cookie)).recv(RECORD_SIZE)
            _, (accepted,), _, _ = socket.recv_fds(listener, RECORD_SIZE, 1)
            stack.callback(os.close, accepted)
        old.broker.streams.reap()  # reads inodes
        first, second, third = old.fabric.connections.values()
        writer = Writer(old.fabric)
        state = succession.save_broker(writer, old.broker)
        rows = [row for row in state["served"]["streams"]["connections"] if row[0] < third.number]
        old.fabric.end(second.number)
        state["served"]["streams"]["ended"] = [second.number]

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = stack.enter_context(ours), rows, in_format_4(state, rows), writer.descriptors
        playing = threading.Thread(target=hand_over, args=arguments)
        playing.start()
        # A successor blocks signals until it serves; later tests' programs would inherit that.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        predecessor = succession.Predecessor(theirs.detach(), earlier_format.FORMAT)
        stack.callback(gc.enable)
        predecessor.receive(lambda _: pytest.fail("a part in advance"))
        predecessor.confirm()
        playing.join()
        new = Served(stack)
        reader = Reader(new.fabric, predecessor.descriptors)
        succession.restore_broker(reader, predecessor.state, new.loop, new.broker)

        assert list(new.fabric.connections) == [first.number, third.number]
        assert new.broker.streams.inodes() == old.broker.streams.inodes()
        assert new.broker.streams.find_accepted(os.fstat(accepted).st_ino) is not None
        taken = new.fabric.contexts.require(3)
        reply = new.ask(taken, client.connect((2, 5000), SIZES, 5)).recv(RECORD_SIZE)
        assert client.decode_reply(reply).local == (3, third.local[1] + 1)
        _, (accepted,), _, _ = socket.recv_fds(listener, RECORD_SIZE, 1)
        os.close(accepted)
