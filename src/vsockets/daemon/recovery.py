"""Recovery after vsockd was killed: its state from the journal, and the interrupted request."""

from __future__ import annotations

import _socket
import logging
import marshal
import os
import socket
from collections.abc import Sequence
from typing import Any

from .._linux.inspection import open_descriptors
from ..fabric import Endpoint, EndpointKind, Party
from ..model.constants import LAST_RESERVED_PORT, VMADDR_PORT_ANY
from ..state_folder import SEQPACKET, STREAM
from .admin.control import ControlSocket
from .broker import Broker
from .channel import Channel, consume
from .credentials import peer_credentials
from .device_link import HandoffLink
from .handover import Reader, Saved
from .hybrid_listener import HybridChannel, HybridListener
from .in_flight import HYBRID, InFlight, Step
from .journal import JournalDamaged, Left, read_entries
from .named_sockets import close_recovered, recover_names, recover_node

log = logging.getLogger(__name__)

#: Ports from the next one on that are taken for ephemeral ones.
_NEXT_PORTS = 1 << 16


class SharedDescriptors(Sequence[int]):
    """The descriptors that the journal names, by their own numbers."""

    def __init__(self) -> None:
        self.present = open_descriptors()
        self.named: set[int] = set()

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, number: Any) -> Any:
        """Return ``number``.  Raises JournalDamaged if no such descriptor is open."""
        if number not in self.present:
            raise JournalDamaged(f"the journal is damaged: it names descriptor {number}")
        self.named.add(number)
        return number


class Killed:
    """A vsockd that was killed, as seen by the one that replaces it."""

    def __init__(self, in_flight: InFlight, kept: set[int]) -> None:
        """Start without state; the descriptors ``kept`` are not vsockd's."""
        self.state: Saved = {}
        self.in_flight = in_flight
        self.left: Left | None = None  #: to do for the request under way
        self.serial = 0  #: the number of the entry with ``left``
        self.is_decided = False  #: whether the request under way has been decided
        self.reader: Reader | None = None  #: set when the state is restored
        self.descriptors = SharedDescriptors()
        self._kept = kept
        self._link: HandoffLink | None = None  #: whose message was being served

    def receive(self) -> None:
        """Read the journal.

        Raises JournalDamaged.
        """
        memory = self.in_flight.memory
        journal = self.descriptors[memory.journal]
        entries = read_entries(journal)
        self.state, left, serial = next(entries)
        _merge_parts(self.state)
        last = serial
        state = _Tables(self.state)
        for entry in entries:
            changes, left, serial = entry
            state.apply(changes)
            last = serial or last
        committed = memory.request.committed
        if memory.request.serving and committed:
            self.is_decided = last == committed
            if serial == committed:
                self.left, self.serial = left, serial
        state.finish()
        # The next journal replaces it.
        self.descriptors.named.discard(journal)

    def confirm(self) -> None:
        """Do nothing: the other process has ended."""

    def continue_request(self, broker: Broker, control: ControlSocket) -> None:
        """Finish the request that was being served; close descriptors that are not used."""
        request, doomed = self.in_flight.request, self.in_flight.memory.doomed
        orphans = self.orphans()
        self._link = self._find_link(request.fd) if request.serving else None
        clients = self._find_clients(orphans, broker)
        passed = -1  # a descriptor that was to be sent
        if self.left is not None and self.left[0] in ("answer", "connect"):
            passed = self.left[-1]
        recover_names()
        accepted = [fd for fd in orphans if fd != passed and control.owns(fd)]
        for fd in orphans:
            used = fd in clients or fd == passed or fd in accepted
            if not used and not recover_node(fd):
                os.close(fd)
        if doomed in clients:
            clients.pop(doomed).close()
        self.in_flight.memory.doomed = -1
        if request.serving and not self.in_flight.is_done(Step.TAKE):
            self._continue(broker, control, clients)
        for sock in clients.values():
            sock.close()
        if passed in orphans and passed not in self.descriptors.named:
            os.close(passed)
        close_recovered()
        assert broker.journal is not None
        broker.journal.end_request()
        for fd in accepted:
            control.admit(fd)

    def _find_clients(self, orphans: list[int], broker: Broker) -> dict[int, socket.socket]:
        """Return the connections of clients that may be the one of the request under way."""
        request = self.in_flight.request
        clients = {sock.fileno(): sock for sock in control_sockets(orphans)}
        if request.serving and request.kind == HYBRID:
            guest = broker.fabric.contexts.get(request.cid)
            listener = getattr(guest and guest.fallback, "__self__", None)
            if isinstance(listener, HybridListener):
                found = [fd for fd in orphans if listener.owns(fd)]
                return {fd: socket.socket(fileno=fd) for fd in found}
        if self.left is not None and self.left[1] in orphans and self.left[1] not in clients:
            # It has come over a link.
            clients[self.left[1]] = socket.socket(fileno=self.left[1])
        return clients

    def _continue(
        self, broker: Broker, control: ControlSocket, clients: dict[int, socket.socket]
    ) -> None:
        """Serve the request that was being served, or what is left of it."""
        link, in_flight = self._link, self.in_flight
        if self.left is None and not self.is_decided:
            if in_flight.is_done(Step.CONSUME) and not in_flight.is_done(Step.REPLY):
                in_flight.begin_next()  # it needed no reply and changed nothing
            if link is None:
                self._serve(broker, clients)
                return
            if not in_flight.is_done(Step.REPLY):  # else the request was refused
                link.serve_message()
                return
        elif self.left is not None and self.left[0] in ("consume", "answer"):
            self._finish_session(control)
        elif self.left is not None and self.left[0] != "done":
            self._finish(broker, clients)
        if link is not None:
            link.take()

    def _finish_session(self, control: ControlSocket) -> None:
        """Do the step that is left for an administrator's request."""
        assert self.left is not None
        what, fd, *rest = self.left
        session = control.find(fd)
        if session is None:
            return
        if what == "consume":
            session.consume_once(*rest)
        else:
            session.send_once(*rest)

    def _finish(self, broker: Broker, clients: dict[int, socket.socket]) -> None:
        """Do the steps that are left for a request that was decided."""
        assert self.left is not None
        what, fd, *rest = self.left
        channel = broker.find_kept(fd)
        if channel is None and fd in clients:
            sock = clients.pop(fd)
            link = self._link
            channel = self._channel(broker, sock) if link is None else link.reopen(sock.detach())
        if channel is None:
            return  # it was closed already
        try:
            self._finish_channel(broker, channel, what, rest)
        except OSError as error:
            log.warning("a request was lost when vsockd was killed: %s", error)
        if broker.find_kept(fd) is None:
            channel.close()

    def _finish_channel(self, broker: Broker, channel: Channel, what: str, rest: list[Any]) -> None:
        reader = self.reader
        assert reader is not None
        if what == "reply":
            record, polling = rest
            channel.send(record, self.in_flight)
            consume(channel, polling)
        elif what == "route":
            record, route = rest
            channel.send_descriptor(record, route)
            consume(channel, False)
        elif what == "offer":
            link, record = rest
            target = reader.link(link)
            assert isinstance(target, HandoffLink)
            target.hand_over(record, channel.sock, self.in_flight)
        else:
            number, listener, flags, token = rest
            connection = broker.fabric.connections.get(number)
            if connection is None:
                return  # it has ended
            target = reader.channels[listener].listener
            if token in self.orphans() and not self.in_flight.is_done(Step.ANNOUNCE):
                self.descriptors.named.add(token)
                target.set_token(token)
            broker.complete(channel, flags, connection, target)
            if channel.is_device:
                broker.queries.report_listener_size(connection)

    def _serve(self, broker: Broker, clients: dict[int, socket.socket]) -> None:
        """Serve a request that was not decided; do not send a refusal twice."""
        request = self.in_flight.request
        fd = request.fd
        channel = broker.find_kept(fd) if fd >= 0 else None
        if fd < 0 and clients:
            channel = self._channel(broker, clients.popitem()[1])
        if channel is None:
            return
        if self.in_flight.is_done(Step.REPLY):
            consume(channel, self.in_flight.is_polling)
            if fd < 0:
                broker.resume(channel)
            elif not channel.may_retry():
                broker.drop(channel)
        elif fd < 0:
            broker.serve_first(channel)
        else:
            broker.continue_kept(channel)

    def _find_link(self, fd: int) -> HandoffLink | None:
        """Return the link with this descriptor, if it is one."""
        assert self.reader is not None
        links = self.reader.links.values()
        found = (one for one in links if isinstance(one, HandoffLink) and one.fileno() == fd)
        return next(found, None) if fd >= 0 else None

    def _channel(self, broker: Broker, sock: socket.socket) -> Channel:
        """Return a channel for a client whose context has accepted it."""
        request = self.in_flight.request
        plain = _socket.socket(fileno=sock.detach())
        if request.kind == HYBRID:
            host = broker.fabric.contexts.host
            return HybridChannel(plain, host, request.cid, peer_credentials(plain))
        kind = EndpointKind.SEQPACKET if request.kind else EndpointKind.STREAM
        context = broker.fabric.contexts.require(request.cid)
        return Channel(plain, context, kind, peer_credentials(plain))

    def orphans(self) -> list[int]:
        """Return the descriptors of the killed vsockd that the journal does not name."""
        return sorted(self.descriptors.present - self.descriptors.named - self._kept)


def _merge_parts(state: Saved) -> None:
    """Add the parts of the journal's beginning that were saved before the rest."""
    streams = state["served"]["streams"]
    contexts: dict[int, Saved] = {}
    channels: dict[int, Saved] = {}
    endpoints: dict[int, Saved] = {}
    connections: dict[int, Any] = {}
    for part in map(marshal.loads, state.pop("parts")):
        contexts |= {one["cid"]: one for one in part["contexts"]}
        channels |= part["channels"]
        endpoints |= part["endpoints"]
        connections |= {row[0]: row for row in part["connections"]}
    for rows, removed in (
        (contexts, state["removed"]),
        (channels, state["dropped"]),
        (connections, streams["ended"]),
    ):
        while removed:
            del rows[removed.pop()]
    contexts |= {one["cid"]: one for one in state["contexts"]}
    connections |= {row[0]: row for row in streams["connections"]}
    state["contexts"], streams["connections"] = list(contexts.values()), list(connections.values())
    state["channels"], state["endpoints"] = (
        channels | state["channels"],
        endpoints | state["endpoints"],
    )


_DATAGRAM_TABLES = ("receivers", "sockets", "routes", "draining")


class _Tables:
    """The tables of the journal's beginning, changed by its entries."""

    def __init__(self, state: Saved) -> None:
        self._state = state
        self._streams = state["served"]["streams"]
        self._connections = {row[0]: row for row in self._streams["connections"]}
        self._contexts = {one["cid"]: one for one in state["contexts"]}
        self._listeners = {one["cid"]: one for one in state["listeners"]}
        self._sessions = {one["socket"]: one for one in state["control"]["sessions"]}
        self._tables: dict[str, dict[int, Any]] = {
            "channels": state["channels"],
            "endpoints": state["endpoints"],
            "links": state["links"],
            **{name: state["datagrams"][name] for name in _DATAGRAM_TABLES},
            "connections": self._connections,
            "moved": self._streams["moved"],
            "pending": self._connections,
            "contexts": self._contexts,
            "listeners": self._listeners,
            "sessions": self._sessions,
            "values": {0: state["following"], 1: state["settings"]},
        }
        kept = state["served"]["kept"]
        for number, row in state["channels"].items():
            row["kept"] = number in kept

    def apply(self, changes: list[tuple[str, int, Any]]) -> None:
        """Change the rows of one entry."""
        for table, number, row in changes:
            if table == "ended":
                for one in row:
                    self._connections.pop(one, None)
                continue
            if table == "refusals":
                if number in self._contexts:
                    counts = self._contexts[number]["counts"]
                    counts["refusals"], counts["denials"] = row
                continue
            if table == "context_moved":
                if number in self._contexts:
                    self._contexts[number]["moved"] = row
                continue
            if row is not None and table in ("connections", "pending"):
                self._count(row, table == "connections")
            if row is None:
                self._tables[table].pop(number, None)
            else:
                self._tables[table][number] = row

    def _count(self, row: tuple[Any, ...], is_established: bool) -> None:
        """Count a stream in its two contexts, and its number and its port."""
        number, cid, _, (_, port), (peer, _), *_ = row
        is_next = number > self._state["last_number"] or number == 1  # they begin again
        if is_next:
            self._state["last_number"] = number
        for one, name in ((cid, "connects"), (peer, "accepts")):
            if is_established and one in self._contexts:
                self._contexts[one]["counts"][name] += 1
        if cid in self._contexts:
            following, datagrams = self._contexts[cid]["following"]
            if 0 <= port - following < _NEXT_PORTS:  # else the program has chosen it
                following = port + 1 if port < VMADDR_PORT_ANY - 1 else LAST_RESERVED_PORT + 1
                self._contexts[cid]["following"] = [following, datagrams]

    def finish(self) -> None:
        """Return the tables in the form of the hand-over."""
        state, channels = self._state, self._state["channels"]
        values = self._tables["values"]
        state["following"], state["settings"] = values[0], values[1]
        state["contexts"] = list(self._contexts.values())
        state["listeners"] = list(self._listeners.values())
        state["control"]["sessions"] = list(self._sessions.values())
        state["last_number"] += 1  # a connect under way may have used the number
        served = state["served"]
        served["kept"] = [number for number, row in channels.items() if row["kept"]]
        served["names"] += 1 << 32  # each bind has used one
        state["datagrams"]["names"] += 1 << 32
        served["holders"] = [
            (row["secret"], number) for number, row in channels.items() if row["secret"]
        ]
        rows = self._streams["connections"] = list(self._connections.values())
        groups: dict[int, list[int]] = {}
        for row in rows:
            if row[-1] is not None:
                groups.setdefault(row[-1], []).append(row[0])
        self._streams["liveness"] = {
            "groups": {
                fd: {"epoll": fd, "numbers": held, "registered": len(held), "inodes": []}
                for fd, held in groups.items()
            },
            "order": list(groups),
            "current": None,
            "filled": None,
            "with_room": [],
            "room": [0, 0],
        }


def recover_pending(broker: Broker) -> None:
    """Count the connections that are not accepted yet, after a vsockd that was killed."""
    by_listener: dict[Endpoint, list[Party]] = {}
    for connection in broker.fabric.connections.values():
        by_listener.setdefault(connection.listener, []).append(connection.party)
    for listener in broker.listening():
        endpoint = listener.channel.endpoint
        if endpoint is not None:
            listener.recover_pending(by_listener.get(endpoint, ()))


def control_sockets(descriptors: Sequence[int]) -> list[socket.socket]:
    """Return those of ``descriptors`` that are clients' connections to a control socket."""
    found = []
    for fd in descriptors:
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            continue  # not a socket
        try:
            is_client = (
                sock.family == socket.AF_UNIX
                and sock.getsockname() in (STREAM, SEQPACKET)
                and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            )
        except OSError:
            is_client = False
        if is_client:
            found.append(sock)
        else:
            sock.detach()
    return found
