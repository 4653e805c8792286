"""The real broker, whose clients and devices are played.

All ends of all sockets are in this process, so the kernel's sockets are real, and nothing happens
at the same time.  Time, the order of events, processes and their rights are simulated.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import gc
import logging
import marshal
import os
import resource
import socket
from collections import Counter, deque
from random import Random
from socket import AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM
from typing import Any, ClassVar, cast

from vsockets.daemon import broker as broker_module
from vsockets.daemon import channel as channel_module
from vsockets.daemon import device_link, limit_checks, scheduling, succession
from vsockets.daemon.broker import Broker
from vsockets.daemon.channel import Channel
from vsockets.daemon.device_link import DeviceLink
from vsockets.daemon.handover import Reader, Writer
from vsockets.daemon.named_sockets import probe_of
from vsockets.fabric import (
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    Change,
    Connection,
    Credentials,
    Endpoint,
    EndpointKind,
    Fabric,
    Limits,
    Refused,
)
from vsockets.model.buffers import BufferSizes
from vsockets.model.constants import VMADDR_CID_ANY, VMADDR_CID_LOCAL, VMADDR_PORT_ANY
from vsockets.protocol import PADDING, RECORD_SIZE, Record, Role, client

from .broker_clients import (
    Client,
    Device,
    Errors,
    Process,
    ProgramChannel,
    SimulatedAudit,
    close_broker,
    dispose,
    fill_descriptors,
)
from .engine import World, pick
from .simulated_sockets import SimulatedLoop, SimulatedSockets

HOST, GUESTS = 2, (3, 4)
ANY = VMADDR_PORT_ANY
OWNER, ALICE = 1000, 1001
STREAM, SEQPACKET = EndpointKind.STREAM, EndpointKind.SEQPACKET
TYPES = {STREAM: SOCK_STREAM, SEQPACKET: SOCK_SEQPACKET}
SIZES = BufferSizes()
DEVICE_PORT = 7000
_NOW = MSG_DONTWAIT | MSG_NOSIGNAL


class BrokerWorld(World):
    """Programs and devices of a host and two guests, and vsockd's broker."""

    actions: ClassVar[dict[str, int]] = {
        "start": 4,
        "enter": 3,
        "bind": 12,
        "listen": 10,
        "connect": 22,
        "crowd": 2,
        "turn": 50,
        "time": 6,
        "read": 40,
        "accept": 16,
        "exchange": 10,
        "close": 5,
        "kill": 2,
        "attach": 3,
        "offer": 14,
        "settle": 12,
        "guest_connect": 4,
        "detach": 1,
        "reap": 3,
        "change": 2,
        "limit": 2,
        "exhaust": 5,
        "wrap": 2,
        "replace": 2,
        "kill_vsockd": 1,
    }
    faults = frozenset(
        {"kill", "detach", "change", "limit", "exhaust", "wrap", "kill_vsockd", "replace", "close"}
    )

    def __init__(self) -> None:
        self.errors = Errors()
        logging.getLogger("vsockets").addHandler(self.errors)
        for type_ in (SOCK_STREAM, SOCK_DGRAM):  # which a process keeps
            probe_of(int(type_))
        self.fillers = fill_descriptors()
        self.descriptors = set(os.listdir("/proc/self/fd"))
        gc.disable()  # it would close descriptors of earlier worlds
        self.loop = SimulatedLoop(SimulatedSockets())
        self.pids = self.cookies = self.ids = 0
        self.processes: dict[int, Process] = {}
        ProgramChannel.processes = self.processes
        self.clients: list[Client] = []
        #: connections that vsockd has not accepted yet: their clients and sockets
        self.arriving: deque[tuple[Process, EndpointKind, socket.socket]] = deque()
        self.devices: list[Device] = []
        self.ids_of: dict[bytes, Client] = {}
        self._start()

    def patches(self) -> list[tuple[Any, str, Any]]:
        modules = broker_module, channel_module, limit_checks, scheduling, device_link
        return [
            *((module, "monotonic", lambda: self.loop.time()) for module in modules),
            (succession, "_LISTENERS_PER_PART", 1),
            (succession, "_STREAMS_PER_PART", 2),
            (channel_module, "dispose", dispose),
            (succession, "_CHANNELS", {**succession._CHANNELS, "ProgramChannel": ProgramChannel}),
            (logging.getLogger("vsockets"), "propagate", False),
        ]

    def _start(self) -> None:
        self.is_serving = True
        self.fabric = Fabric(OWNER)
        self.broker = Broker(cast(Any, self.loop), self.fabric, cast(Any, SimulatedAudit()))
        self.broker.streams.open()
        for cid in GUESTS:
            self.fabric.contexts.add(cid, "", ALICE)
        self._narrow()

    def _narrow(self) -> None:
        for context in self.fabric.contexts:
            context.connected.following = ANY - 3

    def _stop(self) -> None:
        """Close all descriptors of vsockd, as the kernel does when it ends."""
        while self.arriving:
            self.arriving.popleft()[2].close()
        self.loop.forget()
        close_broker(self.broker)

    def close(self) -> None:
        if self.is_serving:
            self._stop()
        for one in self.clients:
            one.sock.close()
        for device in self.devices:
            self._end(device)
        self.loop.close()
        gc.enable()
        logging.getLogger("vsockets").removeHandler(self.errors)
        for fd in self.fillers:
            os.close(fd)

    # vsockd

    def do_turn(self, chance: Random) -> None:
        """vsockd accepts a connection, or serves an event."""
        if self.arriving and chance.random() < 0.6:
            self._accept_client()
        else:
            self.loop.turn(chance)

    def _accept_client(self) -> None:
        process, kind, theirs = self.arriving.popleft()
        sock = _socket.socket(AF_UNIX, TYPES[kind], 0, theirs.detach())
        context = self.fabric.contexts.require(process.cid)
        credentials = Credentials(process.pid, process.uid, process.uid)
        self.broker.serve_first(ProgramChannel(sock, context, kind, credentials))

    def do_time(self, chance: Random) -> None:
        self.loop.advance(chance.choice([0.001, 0.03, 1.0, 11.0]))

    def do_reap(self, chance: Random) -> None:
        for _ in self.broker.refresh():
            pass

    def do_exhaust(self, chance: Random) -> None:
        """vsockd has few descriptors left, for a while."""
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        for one in self.clients:
            one.may_end |= bool(one.awaits)  # vsockd may have no descriptor to keep it
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + chance.randrange(6), before[1]))
        try:
            for _ in range(chance.randrange(1, 4)):
                self.do_turn(chance)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def do_wrap(self, chance: Random) -> None:
        """As if four billion ports had been assigned."""
        self._narrow()

    def do_limit(self, chance: Random) -> None:
        context = self.fabric.contexts.require(chance.choice([HOST, *GUESTS]))
        limits = Limits(sockets=chance.choice([3, 1000]), pending_connects=chance.choice([2, 9]))
        context.set_limits(limits)

    def do_change(self, chance: Random) -> None:
        context = self.fabric.contexts.require(chance.choice(GUESTS))
        change = chance.choice(list(Change))
        try:
            over = self.fabric.change(context, change)
        except Refused:
            return
        ended = {(one.local, one.peer) for one in over}
        for one in self.clients:
            if one.address and one.peer:
                ways = (one.address, one.peer), (one.peer, one.address)
                if ended.intersection(ways):
                    one.sock.shutdown(socket.SHUT_RDWR)
        if change is Change.POWER_OFF:
            self.broker.close_context(context)
            for process in [one for one in self.processes.values() if one.cid == context.cid]:
                self._exit(process)

    def do_kill_vsockd(self, chance: Random) -> None:
        """vsockd is killed and started again."""
        for one in self.clients:
            one.may_end = True
        self._stop()
        for process in [one for one in self.processes.values() if one.cid in GUESTS]:
            self._exit(process)
        self._start()

    def do_replace(self, chance: Random) -> None:
        """A new vsockd takes over all that the old one has, which serves until the last moment."""
        old, old_loop, old_fabric = self.broker, self.loop, self.fabric
        writer = Writer(old_fabric)
        descriptors: list[int] = []
        loop = SimulatedLoop(SimulatedSockets())
        fabric = Fabric(OWNER)
        broker = Broker(cast(Any, loop), fabric, cast(Any, SimulatedAudit()))
        reader = Reader(fabric, descriptors)
        for part in succession.save_early(writer, old):
            descriptors += map(os.dup, writer.take_descriptors())
            succession.restore_early(reader, marshal.loads(marshal.dumps(part)), broker)
            for _ in range(chance.randrange(3)):
                chance.choice([self.do_turn, self.do_turn, self.do_reap])(chance)
        before = self._describe()
        writer.find_parties(old_fabric)
        state = marshal.dumps(succession.save_broker(writer, old))
        descriptors += map(os.dup, writer.take_descriptors())
        old_loop.forget()
        loop.now = old_loop.now
        self.loop, self.fabric, self.broker = loop, fabric, broker
        try:
            succession.restore_broker(reader, marshal.loads(state), cast(Any, loop), broker)
            broker.streams.resume()
            broker.streams.open()
        finally:
            close_broker(old)
            old_loop.close()
        after = self._describe()
        assert after == before, f"replaced: {set(after) ^ set(before)}"

    def _describe(self) -> list[object]:
        """Return what vsockd has, as plain values."""
        found: list[object] = [
            (one.number, one.local, one.peer, one.size, one.sizes, one.listener.address)
            for one in self.fabric.connections.values()
        ]
        for context in self.fabric.contexts:
            parties = [
                (one.name, one.sockets, one.pending, one.channels)
                for one in context.parties()
                if one.is_in_use
            ]
            state = context.state, context.connected.following, context.device is None
            found.append((context.cid, *state, *sorted(parties)))
            for port, holder in sorted(context.connected.items()):
                kind = type(holder).__name__
                found.append((context.cid, port, kind, getattr(holder, "listening", None)))
        for link in self._links():
            found.append(("pending", *sorted(link._pending)))
        for channel in self._channels():
            listener = channel.listener
            if listener is not None and channel.endpoint is not None:
                about = listener.is_listening, listener._capacity, channel.endpoint.sizes
                found.append((channel.endpoint.address, len(listener._pending), *about))
        liveness = self.broker.streams._liveness
        found += [("inode", *sorted(liveness._by_inode.items()))]
        for group in liveness.groups():
            found.append(("group", *sorted(group.numbers), group.registered))
        return sorted(found, key=repr)

    # Programs

    def do_start(self, chance: Random) -> None:
        states = [cid for cid in (HOST, *GUESTS) if self.fabric.contexts.require(cid).state.value]
        self.pids += 1
        rights = chance.choice([set(), {CAP_NET_ADMIN, CAP_NET_BIND_SERVICE}])
        cid = chance.choice(states)
        if self.fabric.contexts.require(cid).state.value != "off":
            process = Process(self.pids, chance.choice([OWNER, ALICE]), cid, rights)
            self.processes[process.pid] = process

    def do_kill(self, chance: Random) -> None:
        process = pick(chance, self.processes.values())
        if process is not None:
            self._exit(process)

    def _exit(self, process: Process) -> None:
        del self.processes[process.pid]
        for one in list(process.sockets):
            self._close(one)

    def do_close(self, chance: Random) -> None:
        one = pick(chance, self.clients)
        if one is not None:
            self._close(one)

    def _close(self, one: Client) -> None:
        one.sock.close()
        one.state = "closed"
        one.process.sockets.remove(one)
        self.clients.remove(one)

    def _new(
        self, chance: Random, process: Process | None = None, kind: EndpointKind | None = None
    ) -> Client | None:
        if process is None:
            if not self.processes:
                self.do_start(chance)
            process = pick(chance, self.processes.values())
        if process is None:
            return None
        kind = kind or chance.choice([STREAM, STREAM, SEQPACKET])
        ours, theirs = socket.socketpair(AF_UNIX, TYPES[kind])
        ours.setblocking(False)
        self.cookies += 1
        one = Client(process, kind, ours, self.cookies)
        process.sockets.append(one)
        self.clients.append(one)
        self.arriving.append((process, kind, theirs))
        return one

    def do_enter(self, chance: Random) -> None:
        """A program connects to vsockd and sends nothing yet."""
        self._new(chance)

    def _idle(self, chance: Random, *states: str) -> Client | None:
        found: Client | None = pick(
            chance, [one for one in self.clients if one.state in states and not one.awaits]
        )
        return found

    def _ask(self, one: Client, what: str, request: bytes) -> None:
        try:
            one.sock.send(request, _NOW)
        except (BrokenPipeError, ConnectionResetError):
            one.state = "closed"
            return
        one.awaits = what

    def do_bind(self, chance: Random) -> None:
        one = (chance.random() < 0.3 and self._idle(chance, "new")) or self._new(chance)
        if one:
            port = chance.choice([ANY, ANY, 5000, 5001, 80, ANY - 2])
            cid = chance.choice([VMADDR_CID_ANY, VMADDR_CID_ANY, VMADDR_CID_LOCAL])
            self._ask(one, "bind", client.bind((cid, port), sizes=SIZES, cookie=one.cookie))

    def do_listen(self, chance: Random) -> None:
        one = self._idle(chance, "bound")
        if one is not None:
            self._ask(one, "listen", client.listen(chance.choice([0, 1, 5]), SIZES))

    def do_connect(self, chance: Random) -> None:
        one = (chance.random() < 0.5 and self._idle(chance, "new", "bound")) or self._new(chance)
        if not one:
            return
        listeners = self._listeners()
        targets = [(device.cid, DEVICE_PORT) for device in self.devices]
        nobody = [(HOST, 9)]
        known = chance.choice([listeners, listeners, listeners, targets, nobody]) or nobody
        self._connect(chance, one, chance.choice(known))

    def _listeners(self) -> list[tuple[int, int]]:
        return [one.address for one in self.clients if one.state == "listening" and one.address]

    def do_crowd(self, chance: Random) -> None:
        """Many sockets, some of them bound, connect to one device, whose link is full then."""
        device = pick(chance, self.devices)
        for _ in range(8 if device is not None else 0):
            one = (chance.random() < 0.5 and self._idle(chance, "bound")) or self._new(chance)
            if one and device is not None:
                self._connect(chance, one, (device.cid, DEVICE_PORT))
                self.do_turn(chance)

    def _connect(self, chance: Random, one: Client, address: tuple[int, int]) -> None:
        one.wanted = address
        one.polling = chance.random() < 0.3
        one.may_end |= one.wanted[1] == DEVICE_PORT
        self._ask(one, "connect", client.connect(one.wanted, SIZES, one.cookie, one.polling))

    def do_read(self, chance: Random) -> None:
        """A program reads a part of a reply."""
        one = pick(chance, [a for a in self.clients if a.awaits])
        if one is not None:
            self._read(one, chance.choice([1, RECORD_SIZE, RECORD_SIZE]))

    def _read(self, one: Client, most: int) -> None:
        if one.kind is SEQPACKET:
            most = RECORD_SIZE
        try:
            data = one.sock.recv(min(most, RECORD_SIZE - len(one.data)), _NOW)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        one.data += data
        if data and len(one.data) < RECORD_SIZE:
            return
        reply, one.data = one.data, b""
        awaited, one.awaits = one.awaits, ""
        try:
            record = client.decode_reply(reply if data else b"")
        except OSError as error:
            if error.errno == errno.ENETDOWN:
                one.state = "closed"
            return
        assert one.state != "closed"
        if awaited == "connect":
            one.state, one.address, one.peer = "connected", record.local, record.peer
            cid = one.wanted[0]
            assert record.peer[1] == one.wanted[1]
            assert record.peer[0] == (one.process.cid if cid == VMADDR_CID_LOCAL else cid)
            self.ids += 1
            token = b"%8d" % self.ids
            self.ids_of[token] = one
            try:
                one.sock.send(token, _NOW)
            except (BrokenPipeError, ConnectionResetError):
                return
        elif awaited == "listen":
            one.state = "listening"
        else:
            one.state, one.address = "bound", record.local

    def do_accept(self, chance: Random) -> None:
        one = pick(chance, [a for a in self.clients if a.state == "listening"])
        if one is not None:
            self._accept(one)

    def _accept(self, one: Client) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(one.sock, RECORD_SIZE, 1, int(MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        if not data or not fds:
            # vsockd has closed the listener, or says so (EBADF).
            one.state = "closed"
            return False
        record = client.decode_reply(data)
        assert record.role == Role.CONNECTED
        sock = socket.socket(fileno=fds[0])
        accepted = Client(one.process, one.kind, sock, 0, "accepted", "")
        accepted.address, accepted.peer = record.local, record.peer
        one.process.sockets.append(accepted)
        self.clients.append(accepted)
        return True

    def do_exchange(self, chance: Random) -> None:
        """An accepting program reads what the connecting one wrote first."""
        one = pick(chance, [a for a in self.clients if a.state == "accepted"])
        if one is not None:
            self._exchange(one)

    def _exchange(self, one: Client) -> None:
        try:
            token = one.sock.recv(8, _NOW)
        except BlockingIOError:
            return
        except ConnectionResetError:
            token = b""
        if token:
            peer = self.ids_of.get(token)
            assert peer is not None, f"the stream begins with {token!r}"
            self._match(peer, one.address, one.peer)
        one.state = "over"

    @staticmethod
    def _match(peer: Client, local: object, remote: object) -> None:
        told = peer.address, peer.peer
        assert told == (remote, local), f"half told: {told}, not {(remote, local)}"

    # Devices

    def do_attach(self, chance: Random) -> None:
        cid = chance.choice(GUESTS)
        context = self.fabric.contexts.require(cid)
        if context.device is not None or context.state.value == "off":
            return
        ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # soon full
        link = _socket.socket(AF_UNIX, SOCK_SEQPACKET, 0, theirs.detach())
        credentials = Credentials(1, OWNER, OWNER)
        loop = cast(Any, self.loop)
        DeviceLink(loop, self.broker, context, link, credentials, chance.random() < 0.8, False)
        self.devices.append(Device(cid, ours))

    def do_detach(self, chance: Random) -> None:
        device = pick(chance, self.devices)
        if device is not None:
            self._end(device)
            self.devices.remove(device)

    @staticmethod
    def _end(device: Device) -> None:
        device.link.close()
        for _, sock in device.pending:
            sock.close()
        device.pending.clear()
        for sock in device.streams:
            sock.close()

    def do_offer(self, chance: Random) -> None:
        """A device reads a connect from its link."""
        device = pick(chance, self.devices)
        if device is not None:
            self._take_offer(device)

    def _take_offer(self, device: Device) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(device.link, RECORD_SIZE, 1, int(MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self._end(device)
            self.devices.remove(device)
            return True
        if not fds:
            client.decode_notification(data)
            return True
        offer = client.decode_handoff(data)
        assert isinstance(offer, client.PendingConnect)
        device.pending.append((offer, socket.socket(fileno=fds[0])))
        return True

    def do_settle(self, chance: Random) -> None:
        """A device replies to a client, and reports to vsockd."""
        device = pick(chance, [one for one in self.devices if one.pending])
        if device is not None:
            at = chance.randrange(len(device.pending))
            self._settle(device, device.pending.pop(at), chance.random() < 0.6)

    def _settle(
        self, device: Device, pending: tuple[client.PendingConnect, socket.socket], accepts: bool
    ) -> None:
        offer, sock = pending
        local = device.cid, offer.port
        reply = Record(errno.ECONNRESET).encode()
        if accepts:
            reply = Record(0, 0, *offer.peer, *local, Role.CONNECTED).encode()
        with contextlib.suppress(OSError):  # the client has closed
            sock.send(reply, _NOW)
            if offer.polling or sock.type == SOCK_SEQPACKET:
                sock.recv(len(PADDING), _NOW)
        error = 0 if accepts else errno.ECONNRESET
        report = client.settle(local, offer.peer, size=4096 if accepts else 0, error=error)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            socket.send_fds(device.link, [report], [] if accepts else [sock.fileno()])
        if accepts:
            device.streams.append(sock)
        else:
            sock.close()

    def do_guest_connect(self, chance: Random) -> None:
        """A guest connects to the host: its device sends vsockd a channel."""
        device = pick(chance, self.devices)
        listeners = self._listeners()
        if device is None or not listeners:
            return
        ours, theirs = socket.socketpair(AF_UNIX, SOCK_STREAM)
        port = chance.choice([600, 6000, 6001])
        peer = chance.choice(listeners)
        ours.send(client.connect_from_guest(port, peer, SIZES))
        try:
            socket.send_fds(device.link, [b"\0"], [theirs.fileno()])
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            ours.close()
        else:
            device.streams.append(ours)
        theirs.close()

    # Invariants

    def check(self) -> None:
        assert not self.errors.found, self.errors.found
        self._check_parties()
        self._check_ports()

    def _channels(self) -> list[Channel]:
        return [one for kept in self.broker._channels.values() for one in kept]

    def _links(self) -> list[DeviceLink]:
        devices = [context.device for context in self.fabric.contexts]
        return [cast(DeviceLink, one.streams) for one in devices if one is not None]

    def _check_parties(self) -> None:
        pending: Counter[int] = Counter()
        kept: Counter[int] = Counter()
        for channel in self._channels():
            kept[id(channel.party)] += 1
            if channel.silent:
                pending[id(channel.party)] += 1
            listener = channel.listener
            if listener is not None:
                for party in listener._pending:
                    pending[id(party)] += 1
                for _, _, party in listener._held:
                    pending[id(party)] += 1
        for link in self._links():
            for one in link._pending.values():
                pending[id(one.channel.party)] += 1
        held: Counter[int] = Counter()
        for context in self.fabric.contexts:
            for holder in [*context.connected.values(), *context.datagrams.values()]:
                held[id(holder.party)] += 1
            for party in context.parties():
                found = party.sockets, party.pending, party.channels
                expected = held[id(party)], pending[id(party)], kept[id(party)]
                assert found == expected, f"{party}: {found}, not {expected}"

    def _check_ports(self) -> None:
        endpoints = {id(one.endpoint): one for one in self._channels() if one.endpoint}
        for context in self.fabric.contexts:
            for port, holder in context.connected.items():
                if isinstance(holder, Connection):
                    assert self.fabric.connections.get(holder.number) is holder, "leaked"
                    assert holder.local[1] == port
                else:
                    assert id(holder) in endpoints, f"leaked: port {port} of {context}"
            for holder in context.cookies.values():
                assert holder in context.connected.values(), "a cookie of a closed socket"
        for channel in endpoints.values():
            endpoint = channel.endpoint
            assert isinstance(endpoint, Endpoint)
            ports = endpoint.context.connected
            assert ports.get(endpoint.port) is endpoint, f"{endpoint.address} lost its port"
        unsettled = {key for link in self._links() for key in link._pending}
        owners: set[tuple[int, int]] = set()
        for one in self.clients:
            if one.state in ("bound", "listening") and one.address and not one.awaits:
                if (one.wanted[1], *one.address) in unsettled:
                    continue
                unread = self._peek(one)
                if unread is not None:
                    assert unread or one.may_end, f"vsockd has closed {one.address}"
                    continue
                owner = one.process.cid, one.address[1]
                assert owner not in owners, f"port owned twice: {owner}"
                owners.add(owner)
                context = self.fabric.contexts.require(one.process.cid)
                found = context.connected.get(owner[1])
                assert isinstance(found, Endpoint), f"{owner} lost its port to {found}"
                assert found.listening is (one.state == "listening")

    @staticmethod
    def _peek(one: Client) -> bytes | None:
        """Return what a socket has received: no bytes if vsockd has closed it, None if nothing."""
        try:
            return one.sock.recv(1, _NOW | socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""

    def quiesce(self) -> None:
        """Everything pending completes; then all ends close, and nothing is left."""
        chance = Random(0)
        while self._proceed(chance):
            self.check()
        for one in self.clients:
            assert not one.awaits, f"{one.awaits} was never answered"
        for process in list(self.processes.values()):
            self._exit(process)
        for device in self.devices:
            self._end(device)
        self.devices.clear()
        for _ in range(300):
            if not self.loop.turn(chance):
                break
        for _ in self.broker.refresh():
            pass
        self.check()
        for context in self.fabric.contexts:
            assert not context.sockets and not context.cookies, f"leaked by {context}"
            for party in context.parties():
                assert not party.is_in_use, f"in use: {party}"
        assert not self._channels(), "a channel is left"
        assert not self.fabric.connections
        self._stop()
        self.is_serving = False
        self.loop.close()
        left = set(os.listdir("/proc/self/fd")) - self.descriptors
        assert not left, f"descriptors are left: {left}"

    def _proceed(self, chance: Random) -> bool:
        """Let everybody take a step; return whether there was one to take."""
        moved = bool(self.arriving)
        while self.arriving:
            self._accept_client()
        moved |= self.loop.turn(chance)
        for one in list(self.clients):
            if one.awaits:
                before = one.data
                self._read(one, RECORD_SIZE)
                moved |= not one.awaits or one.data != before
            elif one.state == "listening":
                moved |= self._accept(one)
            elif one.state == "accepted":
                self._exchange(one)
        for device in list(self.devices):
            moved |= self._take_offer(device)
            moved = moved or bool(device.pending)
            while device.pending:
                self._settle(device, device.pending.pop(), chance.random() < 0.5)
        self.loop.advance(0.05)
        return moved
