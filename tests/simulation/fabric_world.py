"""The real fabric, below a simulated vsockd that serves programs on a simulated kernel.

The simulated vsockd carries out what the broker does with sockets: it reads requests, calls the
fabric, sends the real records, and hands over by the real functions of ``daemon/handover.py``.
"""

from __future__ import annotations

import errno
from random import Random
from typing import Any, ClassVar

from by_the_guide import ANY, ENDING, HOST, HYPERVISOR, LOCAL, Machine
from by_the_guide import World as Guide
from vsockets.daemon.listeners import encode_accepting, encode_connecting, encode_offer
from vsockets.fabric import (
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    Change,
    Connection,
    Context,
    Denied,
    DevicePorts,
    Endpoint,
    EndpointKind,
    Fabric,
    Isolation,
    Limits,
    Party,
    Profile,
    Refused,
)
from vsockets.model.buffers import BufferSizes
from vsockets.protocol import client
from vsockets.protocol.messages import Op, Record, Request
from vsockets.protocol.names import decode_source, encode_source

from .engine import World, pick
from .fabric_handover import hand_over
from .fabric_invariants import (
    check_addresses,
    check_holders,
    check_parties,
    check_policy,
    check_streams,
    describe,
)
from .simulated_kernel import SimulatedChannel, SimulatedLink, SimulatedProcess, SimulatedStream

OWNER, ALICE, BOB = 1000, 1001, 1002
EPOCH = "0123456789abcdef"
STREAM, SEQPACKET, DATAGRAM = EndpointKind.STREAM, EndpointKind.SEQPACKET, EndpointKind.DATAGRAM
SIZES = [BufferSizes(), BufferSizes(), BufferSizes(1024, 128, 2048), BufferSizes(65536, 4096)]


class FabricWorld(World):
    """Programs of the host and of guests, devices, and a vsockd that may be replaced."""

    actions: ClassVar[dict[str, int]] = {
        "start": 6,
        "kill": 2,
        "bind": 12,
        "connect": 16,
        "listen": 8,
        "read": 20,
        "serve": 40,
        "close": 6,
        "hang_up": 12,
        "reap": 12,
        "send": 6,
        "receive": 6,
        "change": 6,
        "replace": 3,
        "kill_vsockd": 1,
        "attach": 3,
        "settle": 8,
        "report": 10,
        "detach": 1,
        "wrap": 2,
        "add": 2,
        "remove": 2,
        "isolate": 3,
        "limit": 1,
        "drop_rights": 1,
        "disconnect": 1,
        "reuse": 2,
    }
    faults = frozenset(
        {
            "kill",
            "change",
            "replace",
            "kill_vsockd",
            "detach",
            "wrap",
            "remove",
            "disconnect",
            "reuse",
        }
    )

    def __init__(self) -> None:
        self.pids = self.cookies = self.serial = 0
        self.guide = Guide(OWNER)
        self.machines = self.guide.machines
        self.processes: list[SimulatedProcess] = []
        self.channels: list[SimulatedChannel] = []  # that vsockd or a program has
        self.streams: list[SimulatedStream] = []  # that vsockd or a program has
        self.watched: dict[int, SimulatedStream] = {}  # vsockd's
        self.links: list[SimulatedLink] = []
        self.counted: dict[Machine, int] = {}
        self.limits: dict[int, Limits] = {}
        self.fabric = Fabric(OWNER)
        self._narrow(self.fabric.contexts.host)
        for cid, profile in ((3, "default"), (4, "restricted"), (5, "legacy")):
            self._add(cid, profile, cid == 5, "", ALICE)

    # Helpers

    def context(self, machine: Machine) -> Context:
        context = self.fabric.contexts.get(machine.cid)
        assert context is not None, f"context {machine.cid} is missing"
        return context

    @staticmethod
    def _narrow(context: Context) -> None:
        for ports in (context.connected, context.datagrams):
            ports.following = ANY - 3

    def _add(self, cid: int, profile: str, unrestricted: bool, domain: str, owner: int) -> None:
        context = self.fabric.contexts.add(cid, "", owner)
        context.isolation = Isolation(Profile(profile), unrestricted, domain)
        self._narrow(context)
        self.machines[cid] = Machine(cid, owner, profile, unrestricted, domain)

    def _programs(self) -> list[SimulatedProcess]:
        return [one for one in self.processes if one.alive]

    def _open(self) -> list[SimulatedChannel]:
        return [one for one in self.channels if one.is_open]

    # Programs

    def do_start(self, chance: Random) -> None:
        machine = pick(chance, [one for one in self.machines.values() if one.state != "off"])
        rights = chance.choice([set(), set(), {CAP_NET_ADMIN}, {CAP_NET_BIND_SERVICE}])
        uid = chance.choice([OWNER, ALICE, BOB]) if machine.cid != HYPERVISOR else OWNER
        self.pids += 1
        self.processes.append(SimulatedProcess(self.pids, uid, machine, rights))

    def _process(self, chance: Random) -> SimulatedProcess | None:
        if not self._programs():
            self.do_start(chance)
        process: SimulatedProcess | None = pick(chance, self._programs())
        return process

    def do_kill(self, chance: Random) -> None:
        process = pick(chance, self._programs())
        if process is not None:
            self._exit(process)

    def _exit(self, process: SimulatedProcess) -> None:
        process.alive = False
        for channel in process.channels:
            channel.close()
        for stream in process.accepted:
            stream.server_open = False
        for link in self.links:
            if link.process is process:
                link.hang_up()
        self.processes.remove(process)

    def _channel(self, chance: Random, kinds: list[EndpointKind]) -> SimulatedChannel | None:
        process = self._process(chance)
        if process is None:
            return None
        self.cookies += 1
        channel = SimulatedChannel(process, chance.choice(kinds), self.cookies)
        process.channels.append(channel)
        self.channels.append(channel)
        return channel

    def do_bind(self, chance: Random) -> None:
        channel = self._channel(chance, [STREAM, STREAM, SEQPACKET, DATAGRAM])
        if channel is None:
            return
        cid = chance.choice([ANY, ANY, channel.machine.cid, LOCAL, 3])
        port = chance.choice([ANY, 5000, 5000, 5001, 80, ANY - 2])
        channel.awaits = "bind"
        sizes = chance.choice(SIZES)
        channel.requests.append(client.bind((cid, port), sizes=sizes, cookie=channel.cookie))

    def do_listen(self, chance: Random) -> None:
        channel = pick(
            chance,
            [
                *(one for one in self._open() if one.address and not one.awaits),
            ],
        )
        if channel is None or channel.kind is DATAGRAM or channel.is_listening or channel.stream:
            return
        channel.backlog = chance.choice([1, 2, 5])
        channel.awaits = "listen"
        channel.requests.append(client.listen(channel.backlog, chance.choice(SIZES)))

    def do_connect(self, chance: Random) -> None:
        channel = None
        if chance.random() < 0.6:
            channel = pick(chance, [one for one in self._open() if one.address])
        channel = channel or self._channel(chance, [STREAM, STREAM, SEQPACKET])
        if channel is None or channel.kind is DATAGRAM or channel.awaits or channel.is_listening:
            return
        if channel.stream is not None:
            return
        peer = self._destination(chance, channel, False)
        channel.awaits = "connect"
        channel.requests.append(client.connect(peer, chance.choice(SIZES), channel.cookie))

    def _destination(
        self, chance: Random, channel: SimulatedChannel, datagram: bool
    ) -> tuple[int, int]:
        known = [
            (LOCAL if one.machine is channel.machine and chance.random() < 0.2 else cid, port)
            for one in self._open()
            if one.address and (one.kind is DATAGRAM) is datagram
            for cid, port in [one.address]
        ]
        devices = [(link.machine.cid, 7000) for link in self.links if link.is_open]
        if datagram:
            devices = []
        elif channel.address and channel.address[0] == LOCAL:
            devices = [(LOCAL, 7000)]  # of its own machine, if that has a device
        others = [(cid, 5000) for cid in (*self.machines, LOCAL, 99)]
        if channel.address and devices:
            known = devices  # a port that is reused while a device decides
        choices = chance.choice([known, known, devices, others]) or others
        return chance.choice(choices)

    def do_read(self, chance: Random) -> None:
        """A program reads a message of vsockd or a device."""
        channel = pick(chance, [one for one in self._open() if one.replies])
        if channel is not None:
            self._read(channel)

    def _read(self, channel: SimulatedChannel) -> None:
        data, stream = channel.replies.popleft()
        if stream is not None:  # accept()
            record = client.decode_reply(data)
            stream.server_told = record.local, record.peer
            channel.process.accepted.append(stream)
            return
        awaited, channel.awaits = channel.awaits, ""
        try:
            record = client.decode_reply(data)
        except OSError:
            if awaited == "connect":
                channel.stream = None
            return
        if awaited == "bind":
            channel.address = record.local
        elif awaited == "listen":
            channel.is_listening = True
        elif awaited == "connect":
            assert channel.stream is not None, "a reply for a stream that does not exist"
            channel.stream.client_told = record.local, record.peer
            channel.address = None

    def do_close(self, chance: Random) -> None:
        ends = [*self._open(), *(end for one in self._programs() for end in one.accepted)]
        end = pick(chance, ends)
        if isinstance(end, SimulatedChannel):
            end.close()
        elif end is not None:
            end.server_open = False
            for process in self.processes:
                if end in process.accepted:
                    process.accepted.remove(end)

    def do_drop_rights(self, chance: Random) -> None:
        process = pick(chance, self._programs())
        if process is not None:
            process.capabilities.clear()

    # vsockd

    def do_serve(self, chance: Random) -> None:
        """vsockd reads a request, of any connection."""
        channel = pick(chance, self._asking())
        if channel is not None:
            self._serve(channel)

    def _asking(self) -> list[SimulatedChannel]:
        away = self.away()
        known = [one for one in self.channels if one.is_known and one.requests]
        return [one for one in known if id(one) not in away]

    def away(self) -> set[int]:
        """Return the channels that are handed off to a device: vsockd has no copy meanwhile."""
        return {id(one.client) for link in self.links for one in link.pending.values()}

    def _serve(self, channel: SimulatedChannel) -> None:
        request = Request.decode(channel.requests.popleft())
        context = self.context(channel.machine)
        try:
            if request.op == Op.BIND:
                self._bind(channel, context, request)
            elif request.op == Op.LISTEN:
                self._listen(channel, request)
            else:
                self._connect(channel, context, request)
        except Refused as refused:
            context.counts.refusals += 1
            if isinstance(refused, Denied):
                context.counts.denials[refused.rule] += 1
            channel.reply(Record(refused.errno).encode())

    def _bind(self, channel: SimulatedChannel, context: Context, request: Request) -> None:
        process = channel.process
        endpoint = self.fabric.bind(
            context,
            channel.kind,
            request.local_cid,
            request.local_port,
            process,
            request.cookie,
        )
        endpoint.handle, channel.endpoint = channel, endpoint
        assert endpoint.cid in (LOCAL, context.cid) and endpoint.port != ANY
        if endpoint.port < 1024:
            assert CAP_NET_BIND_SERVICE in process.capabilities, "reserved port without privilege"
        channel.program = process.program
        channel.reply(Record(0, 0, *endpoint.address).encode())

    def _listen(self, channel: SimulatedChannel, request: Request) -> None:
        assert channel.endpoint is not None
        self.fabric.listen(channel.endpoint, request.sizes())
        channel.reply(Record(0).encode())

    def _connect(self, channel: SimulatedChannel, context: Context, request: Request) -> None:
        fabric, process, bound = self.fabric, channel.process, channel.endpoint
        listener = fabric.find_listener(
            context, channel.kind, request.peer_cid, request.peer_port, process, bound
        )
        target = listener.handle
        server: Machine = target.machine
        check_policy(self, channel, target, True)
        party = context.party_of(process.uid)
        party.check_pending_limit()
        if isinstance(target, SimulatedChannel):
            waiting = sum(stream is not None for _, stream in target.replies)
            if not target.is_open or waiting > target.backlog:
                raise Refused(errno.ECONNRESET, "backlog full")
        elif not target.is_open or not target.process.alive or len(target.offers) > 2:
            raise Refused(errno.ECONNRESET, "the link is full")
        else:
            self._require_settled(target, request.peer_port, context, bound)
        connection = fabric.connect(
            context, listener, bound, request.sizes(), process.credentials, request.cookie
        )
        assert connection.number not in self.watched, "a stream's number is in use"
        stream = SimulatedStream(
            connection.number,
            connection.local,
            connection.peer,
            channel,
            channel.machine,
            server,
            channel.is_open,
        )
        channel.stream = stream
        self.streams.append(stream)
        self.watched[stream.number] = stream
        if isinstance(target, SimulatedLink):
            target.pending[request.peer_port, *connection.local] = stream
            party.pending += 1
            target.offers.append((encode_offer(connection, 0, False), stream))
            return
        channel.endpoint = None
        channel.is_known = False
        channel.reply(encode_connecting(connection))
        target.reply(encode_accepting(connection), stream)

    @staticmethod
    def _require_settled(
        link: SimulatedLink, port: int, context: Context, bound: Endpoint | None
    ) -> None:
        if bound is None:
            context.connected.find_ephemeral(lambda own: (port, context.cid, own) in link.pending)
        elif (port, *bound.address) in link.pending:
            raise Refused(errno.ECONNRESET, "an earlier connect from the address is pending")

    def do_reuse(self, chance: Random) -> None:
        """A client of a pending connect closes; another program binds its port and connects."""
        pending = [
            (link, key)
            for link in self.links
            if link.is_open
            for key in link.pending
            if key[1] != LOCAL
        ]
        found = pick(chance, pending)
        channel = self._channel(chance, [STREAM]) if found is not None else None
        if found is None or channel is None:
            return
        link, (port, cid, local_port) = found
        stream = link.pending[port, cid, local_port]
        if channel.process is stream.client.process or channel.machine.cid != cid:
            return
        stream.client.close()
        if stream.number in self.watched:
            self._end(stream)
        sizes = BufferSizes()
        bind = client.bind((ANY, local_port), sizes=sizes, cookie=channel.cookie)
        connect = client.connect((link.machine.cid, port), sizes, channel.cookie)
        channel.awaits = "bind"
        channel.requests.append(bind)
        self._serve(channel)
        self._read(channel)
        if channel.address is not None:
            channel.awaits = "connect"
            channel.requests.append(connect)
            self._serve(channel)

    def do_hang_up(self, chance: Random) -> None:
        """vsockd notices that a program has closed a connection, or a device its link."""
        links = [one for one in self.links if one.is_open and not one.process.alive]
        found = pick(chance, [*self._hung_up(), *links])
        if isinstance(found, SimulatedLink):
            found.close()
        elif found is not None:
            self._drop(found)

    def _hung_up(self) -> list[SimulatedChannel]:
        away = self.away()
        closed = [one for one in self.channels if one.is_known and not one.is_open]
        return [one for one in closed if not one.requests and id(one) not in away]

    def _drop(self, channel: SimulatedChannel) -> None:
        channel.is_known = False
        if channel.endpoint is not None:
            self.fabric.unbind(channel.endpoint)
            channel.endpoint = None
        self._forget()

    def _forget(self) -> None:
        """Discard what neither vsockd nor a program has."""
        self.channels = [one for one in self.channels if one.is_known or one.is_open]
        watched = set(self.watched.values())
        self.streams = [
            one for one in self.streams if one in watched or one.client_open or one.server_open
        ]

    def do_reap(self, chance: Random) -> None:
        """vsockd notices the end of a stream."""
        stream = pick(chance, [one for one in self.watched.values() if not one.is_alive])
        if stream is not None:
            self._end(stream)

    def _end(self, stream: SimulatedStream) -> None:
        self.fabric.end(stream.number)
        del self.watched[stream.number]
        self._forget()

    def do_disconnect(self, chance: Random) -> None:
        """An administrator ends a stream by its addresses."""
        stream = pick(chance, self.watched.values())
        if stream is not None:
            found = self.fabric.find_connection(stream.peer, stream.local)
            assert found.number == stream.number, "another stream was found by its addresses"
            self._break([found])
            self.fabric.end(found.number)

    def _break(self, connections: list[Connection]) -> None:
        for connection in connections:
            stream = self.watched.pop(connection.number)
            stream.is_broken = True
            stream.client.address = None  # of a bound socket whose connect was pending

    # Datagrams

    def do_send(self, chance: Random) -> None:
        channel = pick(
            chance, [one for one in self._open() if one.kind is DATAGRAM and one.address]
        )
        if channel is None or channel.endpoint is None or not channel.is_known:
            return
        destination = self._destination(chance, channel, True)
        route = channel.routes.get(destination)
        if route is None or not route[1].is_open:
            try:
                endpoint = self.fabric.find_datagram(
                    self.context(channel.machine), *destination, channel.process, channel.endpoint
                )
            except Refused:
                return
            target = endpoint.handle
            check_policy(self, channel, target, False)
            self.serial += 1
            name = encode_source(channel.endpoint.address, EPOCH, self.serial)
            route = channel.routes[destination] = name, target
        assert channel.machine.state == "running", "a suspended machine sends"
        assert channel.address is not None
        if len(route[1].datagrams) < 10:
            route[1].datagrams.append((route[0], channel.address, channel.machine))

    def do_receive(self, chance: Random) -> None:
        channel = pick(chance, [one for one in self._open() if one.datagrams])
        if channel is not None:
            name, source, sender = channel.datagrams.popleft()
            assert decode_source(name) == source, "wrong source"
            assert source[0] != LOCAL or sender is channel.machine, "a local source of another"

    # Devices

    def do_attach(self, chance: Random) -> None:
        free = [
            one
            for one in self.machines.values()
            if one.is_guest and one.state != "off" and self.context(one).device is None
        ]
        machine = pick(chance, free)
        if machine is not None:
            self.pids += 1
            process = SimulatedProcess(self.pids, OWNER, self.machines[HOST], set())
            self.processes.append(process)
            link = SimulatedLink(machine, process)
            link.on_close = self._on_link_closed
            self.links.append(link)
            self._attach(link)

    def _attach(self, link: SimulatedLink) -> None:
        ports = DevicePorts(link.process.credentials, link, None, seqpacket=True)
        self.context(link.machine).device = ports

    def _on_link_closed(self, link: SimulatedLink) -> None:
        link.hang_up()
        context = self.context(link.machine)
        if context.device is not None and context.device.streams is link:
            context.device = None
        for stream in link.pending.values():
            self.client_party(stream).pending -= 1
            if stream.client.endpoint is not None:
                self.fabric.unbind(stream.client.endpoint)
                stream.client.endpoint = None
            stream.client.is_known = False
        link.pending.clear()
        if not link.process.alive:
            self.links.remove(link)

    def client_party(self, stream: SimulatedStream) -> Any:
        machine = stream.client_machine
        if self.machines.get(machine.cid) is not machine:
            return Party("a removed context", None)
        return self.context(machine).party_of(stream.client.process.uid)

    def do_settle(self, chance: Random) -> None:
        """A device decides about a connect, as its guest does."""
        link = pick(chance, [one for one in self.links if one.process.alive and one.offers])
        if link is None:
            return
        data, stream = link.offers.popleft()
        offer = client.decode_handoff(data)
        assert isinstance(offer, client.PendingConnect)
        assert offer.peer == stream.local and (link.machine.cid, offer.port) == stream.peer
        local = link.machine.cid, offer.port
        if chance.random() < 0.6:
            link.held.append(stream)
            record = Record(0, 0, *stream.local, *stream.peer)
            stream.server_told = stream.peer, stream.local
            stream.client.reply(record.encode())
            report = client.settle(local, offer.peer, size=offer.sizes.size)
            link.reports.append((report, None))
        else:
            stream.client.reply(Record(errno.ECONNRESET).encode())
            report = client.settle(local, offer.peer, error=errno.ECONNRESET)
            link.reports.append((report, stream))

    def do_report(self, chance: Random) -> None:
        """vsockd reads a device's report."""
        link = pick(chance, [one for one in self.links if one.is_open and one.reports])
        if link is None:
            return
        data, refused = link.reports.popleft()
        request = Request.decode(data)
        peer = request.peer_cid, request.peer_port
        stream = link.pending.pop((request.local_port, *peer), None)
        if stream is None:
            return
        self.client_party(stream).pending -= 1
        size = 0 if request.backlog else request.size
        context = self.context(link.machine)
        waits = self.fabric.complete_pending(context, request.local_port, peer, size)
        channel = stream.client
        if size:
            assert waits is (stream.number in self.watched), "a connect was not completed"
            if channel.endpoint is not None:
                self.fabric.unbind(channel.endpoint)
                channel.endpoint = None
            channel.is_known = False
        elif waits and refused is not None:
            del self.watched[stream.number]
            stream.client_open = stream.server_open = False
            if channel.stream is stream:
                channel.stream = None
            if channel.endpoint is not None:
                self.fabric.rebind(channel.endpoint)
        else:
            self._drop(channel)
        self._forget()

    def do_detach(self, chance: Random) -> None:
        link = pick(chance, [one for one in self.links if one.is_open])
        if link is not None and link.process.alive:
            self._exit(link.process)

    # Administration

    def do_change(self, chance: Random) -> None:
        machine = pick(chance, [one for one in self.machines.values() if one.is_guest])
        if machine is not None:
            self._change(machine, chance.choice(list(Change)))

    def _change(self, machine: Machine, change: Change) -> None:
        name = change.value
        allowed = not self.guide.may_change(machine, name)
        try:
            over = self.fabric.change(self.context(machine), change)
        except Refused:
            assert not allowed, f"{name} is refused for {machine}"
            return
        assert allowed, f"{name} is allowed for {machine}"
        self.guide.changed(machine, name)
        involved = [
            one
            for one in self.watched.values()
            if machine in (one.client_machine, one.server_machine)
        ]
        numbers = sorted(connection.number for connection in over)
        assert numbers == sorted(one.number for one in involved if name in ENDING), (
            f"{name} ends {numbers} of {involved}"
        )
        self._break(over)
        if name == "suspend":
            for channel in self.channels:
                if channel.machine is machine:
                    channel.routes.clear()
        if name == "power-off":
            self._close_context(machine)

    def _close_context(self, machine: Machine) -> None:
        for channel in [one for one in self.channels if one.machine is machine]:
            if channel.is_known:
                self._drop(channel)
            channel.close()
        for link in [one for one in self.links if one.machine is machine]:
            link.close()
        for process in [one for one in self.processes if one.machine is machine]:
            self._exit(process)
        self._forget()

    def do_wrap(self, chance: Random) -> None:
        """As if four billion ports had been assigned: ports are reused."""
        for context in self.fabric.contexts:
            self._narrow(context)

    def do_add(self, chance: Random) -> None:
        cid = chance.choice([3, 4, 5, 6])
        if cid not in self.machines:
            profile = chance.choice(["default", "restricted", "legacy"])
            self._add(cid, profile, chance.random() < 0.5, "", chance.choice([ALICE, BOB]))

    def do_remove(self, chance: Random) -> None:
        machine = pick(chance, [one for one in self.machines.values() if one.is_guest])
        if machine is not None and not self.fabric.connections_of(self.context(machine)):
            self._close_context(machine)
            self.fabric.contexts.remove(machine.cid)
            del self.machines[machine.cid]

    def do_isolate(self, chance: Random) -> None:
        machine = pick(chance, [one for one in self.machines.values() if one.is_guest])
        if machine is not None:
            machine.profile = chance.choice(["default", "restricted", "legacy", "legacy"])
            machine.unrestricted = chance.random() < 0.5
            machine.domain = chance.choice(["", "", "lab"])
            self.context(machine).isolation = Isolation(
                Profile(machine.profile), machine.unrestricted, machine.domain
            )

    def do_limit(self, chance: Random) -> None:
        machine = pick(chance, [one for one in self.machines.values() if one.cid])
        if machine is not None:
            limits = Limits(sockets=chance.choice([2, 1000]), pending_connects=2)
            self.context(machine).set_limits(limits)

    # Replacing and killing vsockd

    def do_replace(self, chance: Random) -> None:
        """A new vsockd takes over: what it has must be what the old one had."""
        before = describe(self.fabric)
        known = [one for one in self.channels if one.endpoint is not None]
        self.fabric = hand_over(self.fabric, known)
        for link in self.links:
            if link.is_open:
                self._attach(link)
        after = describe(self.fabric)
        for key in before | after:
            assert before.get(key) == after.get(key), (
                f"replaced: {key} is {after.get(key)}, was {before.get(key)}"
            )

    def do_kill_vsockd(self, chance: Random) -> None:
        """vsockd is killed: streams go on, unknown to the next one; all else is closed."""
        for channel in self.channels:
            if channel.is_known:
                channel.is_known, channel.endpoint = False, None
                channel.close()
        for link in list(self.links):
            link.is_open = False
            link.hang_up()
        self.links.clear()
        for stream in self.watched.values():
            stream.is_orphan = True
        self.watched.clear()
        self.counted.clear()
        self.fabric = Fabric(OWNER)
        machines = [one for one in self.machines.values() if one.is_guest]
        self._narrow(self.fabric.contexts.host)
        for one in machines:
            self._add(one.cid, one.profile, one.unrestricted, one.domain, one.owner)
            for process in [a for a in self.processes if a.machine is one]:
                self._exit(process)
        self._forget()

    # Invariants

    def check(self) -> None:
        check_holders(self)
        check_parties(self)
        check_streams(self)
        check_addresses(self)

    def quiesce(self) -> None:
        """Everything pending completes; then all programs end, and nothing is left."""
        chance = Random(0)
        for _ in range(10_000):
            waiting = self._waiting()
            for name in ("serve", "read", "settle", "report", "hang_up", "reap", "receive"):
                getattr(self, f"do_{name}")(chance)
                self.check()
            if not waiting:
                break
        assert not self._waiting(), "something is stuck"
        for channel in self._open():
            stuck = channel.awaits and channel.is_known
            assert not stuck, f"{channel.awaits} was never answered"
        for stream in self.streams:
            if stream.is_alive and stream.number in self.watched:
                assert stream.client_told, "half told: the connecting side was not"
                assert stream.server_told, "half told: the accepting side was not"
        for process in list(self.processes):
            self._exit(process)
        while self._hung_up() or self.watched or any(one.is_open for one in self.links):
            before = len(self.watched), len(self._hung_up()), len(self.links)
            self.do_hang_up(chance)
            self.do_reap(chance)
            after = len(self.watched), len(self._hung_up()), len(self.links)
            assert before != after, f"stuck: {before}"
            self.check()
        for context in self.fabric.contexts:
            assert not context.sockets and not context.cookies, f"leaked by {context}"
            assert not any(one.is_in_use for one in context.parties())
        assert not self.fabric.connections

    def _waiting(self) -> bool:
        return bool(
            bool(self._asking())
            or any(one.replies or one.datagrams for one in self._open())
            or any(one.offers and one.process.alive for one in self.links)
            or any(one.reports and one.is_open for one in self.links)
            or self._hung_up()
            or any(not one.is_alive for one in self.watched.values())
        )
