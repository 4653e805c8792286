"""The real broker with datagram sockets and their routes, whose programs are played."""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from socket import AF_UNIX, MSG_DONTWAIT, SOCK_DGRAM, SOCK_SEQPACKET
from typing import ClassVar

from vsockets._linux.sockets import cookie_of
from vsockets.daemon.datagrams import DatagramSocket
from vsockets.fabric import Change, Context, EndpointKind, Limits, Refused
from vsockets.model.constants import VMADDR_CID_ANY, VMADDR_CID_LOCAL, VMADDR_PORT_ANY
from vsockets.protocol import RECORD_SIZE, client
from vsockets.protocol.names import decode_source

from .broker_clients import Process
from .broker_world import GUESTS, HOST, BrokerWorld
from .engine import pick

ANY = VMADDR_PORT_ANY


@dataclass(eq=False)
class Datagrams:
    """A program's datagram socket."""

    process: Process
    sock: socket.socket
    cookie: int
    address: tuple[int, int] | None = None
    awaits: str = ""  #: the request that vsockd has not replied to
    channel: socket.socket | None = None  #: the connection of that request
    #: sockets to send with; other processes may keep them when the socket is closed
    routes: list[socket.socket] = field(default_factory=list)
    is_open: bool = True


class DatagramWorld(BrokerWorld):
    """Programs of a host and two guests that send each other datagrams."""

    actions: ClassVar[dict[str, int]] = {
        "start": 4,
        "open": 8,
        "ask_bind": 10,
        "ask_route": 24,
        "turn": 50,
        "time": 8,
        "read": 40,
        "send": 40,
        "receive": 30,
        "shut": 6,
        "kill": 2,
        "reap": 2,
        "change": 3,
        "limit": 5,
        "exhaust": 3,
        "wrap": 2,
        "replace": 2,
    }
    faults = frozenset({"shut", "kill", "change", "limit", "exhaust", "wrap", "replace"})

    def __init__(self) -> None:
        self.before = os.getcwd()
        self.folder = tempfile.mkdtemp()
        os.chdir(self.folder)
        super().__init__()
        self.all: list[Datagrams] = []
        self.serial = 0
        self.sent: dict[bytes, tuple[tuple[int, int], int]] = {}  # source, and its CID

    def close(self) -> None:
        for one in self.all:
            self._shut(one, True)
        super().close()
        os.chdir(self.before)
        os.rmdir(self.folder)

    def _narrow(self) -> None:
        super()._narrow()
        for context in self.fabric.contexts:
            context.datagrams.following = ANY - 3

    # Programs

    def do_open(self, chance: Random) -> None:
        if not self.processes:
            self.do_start(chance)
        process = pick(chance, self.processes.values())
        if process is not None:
            sock = socket.socket(AF_UNIX, SOCK_DGRAM)
            sock.setblocking(False)
            self.all.append(Datagrams(process, sock, cookie_of(sock)))

    # The other world's programs have streams.
    def _idle(self, chance: Random, *_: str) -> Datagrams | None:  # type: ignore[override]
        found: Datagrams | None = pick(
            chance, [one for one in self.all if one.is_open and not one.awaits]
        )
        return found

    def _send_request(self, one: Datagrams, what: str, request: bytes) -> None:
        ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
        ours.setblocking(False)
        socket.send_fds(ours, [request], [one.sock.fileno()])
        one.channel, one.awaits = ours, what
        self.arriving.append((one.process, EndpointKind.SEQPACKET, theirs))

    def do_ask_bind(self, chance: Random) -> None:
        one = self._idle(chance)
        if one is not None:
            cid = chance.choice([VMADDR_CID_ANY, VMADDR_CID_ANY, VMADDR_CID_LOCAL])
            port = chance.choice([ANY, ANY, 5000, 5001, 80, ANY - 2])
            self._send_request(one, "bind", client.bind_datagram((cid, port)))

    def do_ask_route(self, chance: Random) -> None:
        one = self._idle(chance)
        known = [a.address for a in self.all if a.address and a.is_open]
        if one is not None:
            destination = chance.choice(known or [(HOST, 5000)])
            if chance.random() < 0.2:
                destination = VMADDR_CID_LOCAL, destination[1]
            self._send_request(one, "route", client.route(destination))

    def do_read(self, chance: Random) -> None:
        """A program reads a reply."""
        one = pick(chance, [a for a in self.all if a.awaits])
        if one is not None:
            self._read_reply(one)

    def _read_reply(self, one: Datagrams) -> bool:
        assert one.channel is not None
        try:
            data, fds, _, _ = socket.recv_fds(one.channel, RECORD_SIZE, 1, int(MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        awaited, one.awaits = one.awaits, ""
        one.channel.close()
        one.channel = None
        try:
            record = client.decode_reply(data)
        except OSError:
            assert not fds
            return True
        if one.address is not None:
            assert record.local == one.address, "another address than before"
        one.address = record.local
        if awaited == "route":
            assert fds, "a reply without the route"
            one.routes.append(socket.socket(fileno=fds[0]))
            one.routes[-1].setblocking(False)
        return True

    def do_send(self, chance: Random) -> None:
        one = pick(chance, [a for a in self.all if a.routes])
        if one is None:
            return
        route = chance.choice(one.routes)
        self.serial += 1
        token = b"%8d" % self.serial
        try:
            route.send(token + bytes(chance.choice([0, 1000])))
        except BlockingIOError:
            return
        except OSError:
            one.routes.remove(route)
            route.close()
            return
        assert one.address is not None
        self.sent[token] = one.address, one.process.cid
        context = self.fabric.contexts.require(one.process.cid)
        assert context.state.value == "running", f"a machine sends that is {context.state.value}"
        holder = context.datagrams.get(one.address[1])
        assert holder is None or holder.cookie == one.cookie, "a route with another's source"

    def do_receive(self, chance: Random) -> None:
        one = pick(chance, [a for a in self.all if a.is_open])
        if one is not None:
            self._receive(one)

    def _receive(self, one: Datagrams) -> bool:
        try:
            data, name = one.sock.recvfrom(2000, MSG_DONTWAIT)
        except OSError:
            return False
        source, cid = self.sent[data[:8]]
        assert decode_source(name) == source, "wrong source"
        assert source[0] != VMADDR_CID_LOCAL or cid == one.process.cid, "a local source"
        return True

    def do_shut(self, chance: Random) -> None:
        """A program closes its socket; another process may keep its routes."""
        one = pick(chance, [a for a in self.all if a.is_open])
        if one is not None:
            self._shut(one, chance.random() < 0.5)

    def _shut(self, one: Datagrams, whole: bool) -> None:
        one.is_open = False
        one.sock.close()
        one.awaits = ""
        if one.channel is not None:
            one.channel.close()
        if whole:
            while one.routes:
                one.routes.pop().close()

    def _exit(self, process: Process) -> None:
        super()._exit(process)
        for one in [one for one in self.all if one.process is process]:
            self._shut(one, True)
        self.all = [one for one in self.all if one.is_open or one.routes]

    # Administration

    def do_change(self, chance: Random) -> None:
        context = self.fabric.contexts.require(chance.choice(GUESTS))
        change = chance.choice(list(Change))
        try:
            self.fabric.change(context, change)
        except Refused:
            return
        if change is Change.SUSPEND:
            self.broker.datagrams.revoke_routes(context)
        elif change is Change.POWER_OFF:
            self.broker.close_context(context)
            for process in [one for one in self.processes.values() if one.cid == context.cid]:
                self._exit(process)

    def do_limit(self, chance: Random) -> None:
        context = self.fabric.contexts.require(chance.choice([HOST, *GUESTS]))
        sockets, queued = chance.choice([2, 3, 1000]), chance.choice([2000, 2000, 1 << 20])
        context.set_limits(Limits(sockets=sockets, datagram_bytes=queued))

    # Invariants

    def _describe(self) -> list[object]:
        found = super()._describe()
        for context in self.fabric.contexts:
            for port, holder in context.datagrams.items():
                found.append((context.cid, port, holder.cookie, self._routes_of(holder.handle)))
        return sorted(found, key=repr)

    @staticmethod
    def _routes_of(handle: object) -> tuple[tuple[int, int], ...]:
        assert isinstance(handle, DatagramSocket)
        return tuple(sorted(handle.routes))

    def check(self) -> None:
        super().check()
        datagrams = self.broker.datagrams
        routes: Counter[int] = Counter()
        for party, share in datagrams._shares.items():
            routes[id(party)] = len(share.quota.routes) + len(share.quota.draining)
        for context in self.fabric.contexts:
            for party in context.parties():
                assert party.routes == routes[id(party)], f"{party}: {party.routes} routes"
            self._check_sockets(context)

    def _check_sockets(self, context: Context) -> None:
        for port, holder in context.datagrams.items():
            assert holder.port == port and holder.party is not None
            assert holder in self.broker.datagrams._shares[holder.party].sockets, "leaked"
        for one in self.all:
            if one.is_open and one.address and one.process.cid == context.cid:
                found = context.datagrams.get(one.address[1])
                assert found is not None and found.cookie == one.cookie, "a socket lost its port"

    def _proceed(self, chance: Random) -> bool:
        moved = super()._proceed(chance)
        for one in self.all:
            if one.awaits:
                moved |= self._read_reply(one)
            if one.is_open:
                moved |= self._receive(one)
        return moved

    def quiesce(self) -> None:
        """Each request is answered; what everybody has closed is released."""
        while self._proceed(Random(0)):
            self.check()
        for one in self.all:
            assert not one.awaits, f"{one.awaits} was never answered"
            self._shut(one, True)
        self.all.clear()
        super().quiesce()
