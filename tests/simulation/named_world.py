"""The real broker with sockets of supervised programs, which vsockd reaches by name."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from random import Random
from socket import AF_UNIX, MSG_DONTWAIT, SOCK_SEQPACKET
from typing import ClassVar

from vsockets.fabric import Endpoint, EndpointKind
from vsockets.model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.protocol import RECORD_SIZE, client

from .broker_clients import Client, Process
from .broker_world import SIZES, TYPES, BrokerWorld
from .engine import pick


@dataclass(eq=False)
class Named:
    """A supervised program's socket, and its supervisor's connection, which holds the port."""

    process: Process
    kind: EndpointKind
    sock: socket.socket
    holder: socket.socket
    secret: int
    state: str = "new"  #: or bound, listening, closed
    awaits: str = ""
    address: tuple[int, int] | None = None
    may_end: bool = False


class NamedWorld(BrokerWorld):
    """Programs below supervisors listen, those of the library connect to them."""

    actions: ClassVar[dict[str, int]] = {
        **{name: weight for name, weight in BrokerWorld.actions.items() if name != "exhaust"},
        "named_bind": 10,
        "named_listen": 12,
        "named_read": 30,
        "named_accept": 20,
        "named_connect": 6,
        "named_close": 3,
    }
    faults = BrokerWorld.faults | {"named_close"}

    def __init__(self) -> None:
        self.before = os.getcwd()
        self.folder = tempfile.mkdtemp()
        os.chdir(self.folder)
        super().__init__()
        self.named: list[Named] = []
        #: accepted sockets from which a record has not been read: the token, and its listener
        self.tokens: list[tuple[Named, socket.socket]] = []

    def close(self) -> None:
        for one in list(self.named):
            self._end_named(one)
        super().close()
        os.chdir(self.before)
        os.rmdir(self.folder)

    def _listeners(self) -> list[tuple[int, int]]:
        named = [one.address for one in self.named if one.state == "listening" and one.address]
        return super()._listeners() + named * 3

    # Supervisors

    def do_named_bind(self, chance: Random) -> None:
        """A supervisor has vsockd bind its program's socket, or one that takes its place."""
        again = [one for one in self.named if one.state == "bound" and not one.awaits]
        if again and chance.random() < 0.2:
            one = chance.choice(again)
            one.sock.close()
            one.sock = socket.socket(AF_UNIX, TYPES[one.kind])
        else:
            if not self.processes:
                self.do_start(chance)
            process = pick(chance, self.processes.values())
            if process is None:
                return
            kind = chance.choice([EndpointKind.STREAM, EndpointKind.SEQPACKET])
            ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
            self.cookies += 1
            one = Named(process, kind, socket.socket(AF_UNIX, TYPES[kind]), ours, self.cookies)
            self.named.append(one)
            self.arriving.append((process, EndpointKind.SEQPACKET, theirs))
        one.sock.setblocking(False)
        one.holder.setblocking(False)
        port = chance.choice([VMADDR_PORT_ANY, 5000, 5001])
        if one.address:
            port = one.address[1]
        request = client.bind_socket((VMADDR_CID_ANY, port), sizes=SIZES, secret=one.secret)
        self._ask_holder(one, "bind", request, [one.sock.fileno()])

    def _ask_holder(self, one: Named, what: str, request: bytes, fds: list[int]) -> None:
        try:
            socket.send_fds(one.holder, [request], fds)
        except (BrokenPipeError, ConnectionResetError):
            self._end_named(one)
            return
        one.awaits = what

    def do_named_listen(self, chance: Random) -> None:
        one = pick(chance, [a for a in self.named if a.state == "bound" and not a.awaits])
        if one is not None:
            one.sock.listen(8)
            self._ask_holder(one, "listen", client.listen(chance.choice([0, 1, 3]), SIZES), [])

    def do_named_read(self, chance: Random) -> None:
        one = pick(chance, [a for a in self.named if a.awaits])
        if one is not None:
            self._read_holder(one)

    def _read_holder(self, one: Named) -> bool:
        try:
            data = one.holder.recv(RECORD_SIZE, MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        awaited, one.awaits = one.awaits, ""
        try:
            record = client.decode_reply(data)
        except OSError:
            self._end_named(one)
            return True
        if awaited == "bind":
            assert one.address in (None, record.local), "another address than before"
            one.state, one.address = "bound", record.local
            assert record.is_named
        else:
            one.state = "listening"
        return True

    def do_named_accept(self, chance: Random) -> None:
        one = pick(chance, [a for a in self.named if a.state == "listening"])
        if one is not None:
            self._accept_token(one)
        if self.tokens:
            self._read_token(chance.randrange(len(self.tokens)))

    def _accept_token(self, one: Named) -> bool:
        try:
            token, _ = one.sock.accept()
        except BlockingIOError:
            return False
        token.setblocking(False)
        self.tokens.append((one, token))
        return True

    def _read_token(self, at: int) -> bool:
        one, token = self.tokens[at]
        try:
            data, fds, _, _ = socket.recv_fds(token, RECORD_SIZE, 1, int(MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        token.close()
        del self.tokens[at]
        if not fds:
            assert not data, "a record without its stream"
            return True
        record = client.decode_reply(data)
        accepted = Client(one.process, one.kind, socket.socket(fileno=fds[0]), 0, "accepted")
        accepted.address, accepted.peer = record.local, record.peer
        assert one.address is not None and record.local[1] == one.address[1]
        one.process.sockets.append(accepted)
        self.clients.append(accepted)
        return True

    def do_named_connect(self, chance: Random) -> None:
        """A supervised program connects from the port of its socket."""
        one = pick(chance, [a for a in self.named if a.state == "bound" and not a.awaits])
        listeners = self._listeners()
        if one is None or not listeners or one.process.pid not in self.processes:
            return
        source = self._new(chance, one.process, one.kind)
        assert source is not None
        source.wanted = chance.choice(listeners)
        source.may_end = True
        request = client.connect(source.wanted, SIZES, source.cookie, secret=one.secret)
        self._ask(source, "connect", request)
        one.may_end = True  # its port moves to the stream

    def do_named_close(self, chance: Random) -> None:
        one = pick(chance, self.named)
        if one is not None:
            self._end_named(one)

    def _end_named(self, one: Named) -> None:
        one.state = "closed"
        one.sock.close()
        one.holder.close()
        for token in [token for token in self.tokens if token[0] is one]:
            token[1].close()
            self.tokens.remove(token)
        if one in self.named:
            self.named.remove(one)

    def _exit(self, process: Process) -> None:
        super()._exit(process)
        for one in [one for one in self.named if one.process is process]:
            self._end_named(one)

    # Invariants

    def do_kill_vsockd(self, chance: Random) -> None:
        for one in self.named:
            one.may_end = True
        super().do_kill_vsockd(chance)

    def check(self) -> None:
        super().check()
        for one in self.named:
            if one.state in ("bound", "listening") and not one.awaits and not one.may_end:
                assert one.address is not None
                context = self.fabric.contexts.require(one.process.cid)
                found = context.connected.get(one.address[1])
                assert isinstance(found, Endpoint), f"{one.address} lost its port to {found}"
                assert found.listening is (one.state == "listening")

    def _proceed(self, chance: Random) -> bool:
        moved = super()._proceed(chance)
        for one in list(self.named):
            if one.awaits:
                moved |= self._read_holder(one)
            if one.state == "listening":
                moved |= self._accept_token(one)
        for at in reversed(range(len(self.tokens))):
            moved |= self._read_token(at)
        return moved
