"""The administrator's socket: JSON objects as requests and replies, one per line.

``{"op": "context.add", "cid": 3}`` is answered by ``{"ok": …}`` or by
``{"error": "…", "errno": 17}``.  The socket's mode admits the fabric's owner and root.

A request of a report with ``"parts": true`` is answered in parts, so that other clients never wait
for it: as long as the answer is ``{"part": [rows]}``, the administrator sends ``{"op":
"continue"}``; ``{"ok": …}`` has the last rows.  Programs of earlier releases do not ask for parts.
"""

from __future__ import annotations

import _socket
import array
import dataclasses
import errno
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from time import thread_time
from typing import Any

from ..._linux.folders import describe, file_mode
from ..._linux.sockets import refuse_descriptors
from ...eventloop.loop import Acceptor, EventLoop
from ...fabric import Change, Context, ContextSettings, Refused
from ...model.address import FIRST_GUEST_CID, LARGEST, LAST_GUEST_CID
from ...state_folder import short_path
from ...toml import Table, kind, one_of, shown
from ..broker import Broker
from ..configuration import (
    LARGEST_ID,
    ConfigurationError,
    read_hybrid,
    read_isolation,
    read_limits,
)
from ..context_manager import ContextManager
from ..credentials import peer_credentials
from ..device_link import DeviceLink
from ..handover import Reader, Saved, Writer
from ..hybrid_listener import PlayedHostLink
from ..in_flight import IN_FLIGHT_MAX_BYTES, Step
from ..journal import Journal
from ..limits import (
    CONTROL_REPORT_PART_ROWS,
    CONTROL_REPORT_STEP_SECONDS,
    CONTROL_REQUEST_MAX_BYTES,
    EVENTS_UNREAD_MAX_BYTES,
)
from . import reports
from .audit import Events, Topic


@dataclasses.dataclass(frozen=True, slots=True)
class ControlHandlers:
    """The parts and operations of vsockd that administrators may use."""

    broker: Broker
    contexts: ContextManager
    events: Events
    status: Callable[[], reports.Report]
    reload: Callable[[], None]
    stop: Callable[[], None]
    #: starts a replacement; its argument is called with the reason if that fails
    replace: Callable[[Callable[[str], None]], None]


class ControlSocket:
    """The listening socket at ``path``; a connection may carry any number of requests."""

    def __init__(
        self,
        loop: EventLoop,
        handlers: ControlHandlers,
        path: Path,
        taken: tuple[Reader, Saved] | None = None,
    ) -> None:
        """Create the socket, unless it is ``taken`` from the previous vsockd.

        Raises OSError if it cannot be created.
        """
        self._loop = loop
        self._handlers = handlers
        self._sessions: set[ControlSession] = set()
        if taken is not None:
            reader, saved = taken
            listener = socket.socket(fileno=reader.descriptors[saved["listener"]])
            listener.setblocking(False)
            for one in saved["sessions"]:
                self._begin(reader.socket(one["socket"], socket.SOCK_STREAM)).restore(reader, one)
        else:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            refuse_descriptors(listener)
            with short_path(path) as spelled, file_mode(0o600):
                listener.bind(spelled)
            listener.listen()
        self._acceptor = Acceptor(loop, listener, "an administrator", self.admit)

    def save(self, writer: Writer) -> Saved:
        """Return the state of the socket and its connections for the next vsockd."""
        return {
            "listener": writer.descriptor(self._acceptor.listener.fileno()),
            "sessions": [session.save(writer) for session in self._sessions],
        }

    def answer_replaced(self, pid: int) -> None:
        """Answer the administrators whose request for a replacement has started this vsockd."""
        for session in list(self._sessions):
            session.answer_replaced({"ok": {"pid": pid}})

    def close(self) -> None:
        """Stop accepting connections."""
        self._acceptor.close()

    def resume(self) -> None:
        """Answer requests that a vsockd which was killed has read."""
        for session in list(self._sessions):
            session.answer_received()

    def find(self, fd: int) -> ControlSession | None:
        """Return the connection with this descriptor, or None."""
        return next((one for one in self._sessions if one.fileno() == fd), None)

    def owns(self, fd: int) -> bool:
        """Return whether ``fd`` is a connection to this socket."""
        return self._acceptor.owns(fd)

    def admit(self, fd: int) -> None:
        """Serve a connection that was accepted."""
        session = self._begin(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd))
        session.record()

    def _begin(self, sock: _socket.socket) -> ControlSession:
        session = ControlSession(self._loop, self._handlers, sock, self._sessions.discard)
        self._sessions.add(session)
        return session


class ControlSession:
    """One administrator's connection, and the leases that end with it."""

    def __init__(
        self,
        loop: EventLoop,
        handlers: ControlHandlers,
        sock: _socket.socket,
        ended: Callable[[ControlSession], None],
    ) -> None:
        """Serve ``sock``; ``ended`` is called when the administrator has closed it."""
        sock.setblocking(False)
        self._ended = ended
        self._awaits_replacement = False
        self._loop = loop
        self._handlers = handlers
        self._sock = sock
        self._received = b""
        self._leases: list[Context] = []
        self._report: reports.Report | None = None  # to be continued
        self._reports: dict[str, Callable[[], reports.Report]] = {
            "status": handlers.status,
            "counts": lambda: reports.counts(handlers.broker),
            "sockets": lambda: reports.socket_rows(handlers.broker),
            "context.list": self._list_contexts,
        }
        self._operations: dict[str, Callable[[Table], Any]] = {
            "context.add": self._add_context,
            "context.change": self._change_context,
            "context.remove": self._remove_context,
            "context.device": self._attach_device,
            "context.ready": lambda request: handlers.contexts.announce_ready(_cid(request)),
            "context.played": self._attach_played_host,
            "stream.disconnect": self._disconnect,
            "reload": lambda _: handlers.reload(),
            "subscribe": self._subscribe,
            "stop": lambda _: handlers.stop(),
            "replace": self._replace,
        }
        self._missed = 0
        self._descriptors: list[int] = []  # to send with the next reply
        loop.watch(sock.fileno(), self._ready)

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self._sock.fileno()

    def record(self, left: tuple[Any, ...] | None = None) -> None:
        """Record the connection, and all that its requests have changed, in the journal."""
        journal = self._handlers.broker.journal
        if journal is not None:
            journal.row("sessions", self._sock.fileno(), self.save(journal.writer))
            journal.commit(left)

    def _ready(self, events: int) -> None:
        journal = self._handlers.broker.journal
        if journal is not None:
            self._ready_with_journal(journal)
            return
        try:
            data = self._sock.recv(CONTROL_REQUEST_MAX_BYTES)
        except (BlockingIOError, ConnectionError):
            data = b""
        if self._receive(data):
            self.answer_received()

    def _ready_with_journal(self, journal: Journal) -> None:
        """Read requests, and put them into the journal before they are removed from the socket."""
        try:
            data = self._sock.recv(IN_FLIGHT_MAX_BYTES, socket.MSG_PEEK)
        except (BlockingIOError, ConnectionError):
            data = b""
        if not self._receive(data):
            return
        fd = self._sock.fileno()
        journal.in_flight.begin(fd)
        self.record(("consume", fd, len(data)))
        journal.in_flight.consume(self._sock, len(data))
        journal.in_flight.end()
        self.answer_received()

    def _receive(self, data: bytes) -> bool:
        """Add received bytes to the requests; return False if the connection was closed."""
        self._received += data
        if not data or len(self._received) > CONTROL_REQUEST_MAX_BYTES:
            self._close()
            return False
        return True

    def answer_received(self) -> None:
        """Answer all requests that were read."""
        while not self._awaits_replacement:
            line, end, rest = self._received.partition(b"\n")
            if not end:
                return
            self._received = rest
            answer = self._answer(line)
            if not (self._awaits_replacement or self._send(answer)):
                return

    def _send(self, answer: dict[str, Any]) -> bool:
        """Send an answer; return False if the connection was closed."""
        data = json.dumps(answer).encode() + b"\n"
        journal = self._handlers.broker.journal
        # Replies fit the socket's buffer, or vsockd waits for the administrator to read.
        self._sock.settimeout(1.0)
        try:
            if journal is not None and len(data) <= IN_FLIGHT_MAX_BYTES:
                self._send_once(journal, data)
            elif self._descriptors:
                rights = array.array("i", self._descriptors)
                self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            else:
                self._sock.sendall(data)
        except OSError:
            self._close()
            return False
        finally:
            while self._descriptors:
                os.close(self._descriptors.pop())
        self._sock.setblocking(False)
        if journal is not None:
            journal.in_flight.end()
        return True

    def _send_once(self, journal: Journal, data: bytes) -> None:
        fd = self._sock.fileno()
        passed = self._descriptors[0] if self._descriptors else -1
        journal.in_flight.begin(fd)
        self.record(("answer", fd, data, passed))
        self.send_once(data, passed)

    def consume_once(self, size: int) -> None:
        """Remove ``size`` bytes, which were read, from the socket, unless that was done before."""
        journal = self._handlers.broker.journal
        assert journal is not None
        journal.in_flight.consume(self._sock, size)

    def send_once(self, data: bytes, passed: int) -> None:
        """Send an answer, with the descriptor ``passed`` if any, unless it was sent before."""
        journal = self._handlers.broker.journal
        assert journal is not None
        journal.in_flight.send(Step.REPLY, self._sock, data, passed)

    def save(self, writer: Writer) -> Saved:
        """Return the connection's state for the next vsockd."""
        contexts = self._handlers.broker.fabric.contexts
        return {
            "socket": writer.descriptor(self._sock.fileno()),
            "received": self._received,
            "leases": [one.cid for one in self._leases if contexts.get(one.cid) is one],
            "topics": self._handlers.events.topics_of(self._send_event),
            "missed": self._missed,
            "awaits_replacement": self._awaits_replacement,
        }

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Restore the state that the previous vsockd has saved."""
        self._received = saved["received"]
        self._leases = [reader.context(cid) for cid in saved["leases"]]
        self._missed = saved["missed"]
        self._awaits_replacement = saved["awaits_replacement"]
        if saved["topics"]:
            topics = [Topic(topic) for topic in saved["topics"]]
            self._handlers.events.subscribe(self._send_event, topics)

    def answer_replaced(self, answer: dict[str, Any]) -> None:
        """Answer a request for a replacement, if the administrator has made one."""
        if self._awaits_replacement:
            self._awaits_replacement = False
            self._send(answer)

    def _replace(self, request: Table) -> None:
        def failed(reason: str) -> None:
            self.answer_replaced({"error": reason, "errno": errno.EIO})

        self._handlers.replace(failed)
        self._awaits_replacement = True

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = _read_request(line)
            op = request.values.get("op")
            if op == "continue":
                return self._continue_report()
            if isinstance(op, str) and op in self._reports:
                self._report = self._reports[op]()
                if request.boolean("parts"):
                    return self._continue_report()
                return self._continue_report(math.inf, math.inf)
            if not isinstance(op, str) or op not in self._operations:
                known = sorted([*self._operations, *self._reports, "continue"])
                raise request.error(f"expected one of {known}", "op")
            return {"ok": self._operations[op](request)}
        except ConfigurationError as error:
            return {"error": str(error), "errno": errno.EINVAL}
        except Refused as refused:
            return {"error": refused.reason, "errno": refused.errno}
        except OSError as error:
            return {"error": describe(error), "errno": error.errno}

    def _close(self) -> None:
        fd = self._sock.fileno()
        self._loop.unwatch(fd)
        self._handlers.events.unsubscribe(self._send_event)
        self._ended(self)
        for context in self._leases:
            self._handlers.contexts.end_lease(context)
        if (journal := self._handlers.broker.journal) is not None:
            journal.row("sessions", fd, None)
            journal.commit()
        self._sock.close()

    # Reports

    def _continue_report(
        self, seconds: float = CONTROL_REPORT_STEP_SECONDS, most: float = CONTROL_REPORT_PART_ROWS
    ) -> dict[str, Any]:
        """Work on the report for a moment; return a part of ``most`` rows, or the answer."""
        if self._report is None:
            raise Refused(errno.ESTALE, "vsockd was replaced during the report: request it again")
        rows: list[reports.Row] = []
        end = thread_time() + seconds
        try:
            while len(rows) < most and thread_time() < end:
                row = next(self._report)
                if row is not None:
                    rows.append(row)
        except StopIteration as stop:
            self._report = None
            return {"ok": stop.value(rows)}
        except BaseException:
            self._report = None
            raise
        return {"part": rows}

    # Contexts

    def _list_contexts(self) -> reports.Report:
        broker = self._handlers.broker
        yield from broker.refresh()
        for listener in list(broker.listening()):
            if listener.is_open():
                listener.recount_pending()  # programs do not report accepted connections
            yield None
        for context in reports.by_cid(broker):
            if context.cid:
                yield self._row(context)
        return list

    def _row(self, context: Context) -> dict[str, Any]:
        folder = self._handlers.contexts.folder_of(context)
        return reports.context_row(self._handlers.broker, context, folder)

    def _add_context(self, request: Table) -> dict[str, Any]:
        wanted = ContextSettings(
            cid=request.integer("cid", FIRST_GUEST_CID, LAST_GUEST_CID),
            name=request.text("name") or "",
            owner=request.integer("owner", 0, LARGEST_ID),
            isolation=read_isolation(request),
            limits=read_limits(
                request.table("limits"), self._handlers.broker.fabric.settings.limits
            ),
            powered=request.boolean("powered") is not False,
            hybrid=read_hybrid(request),
            reserved_ports=bool(request.boolean("reserved_ports")),
            parent=request.integer("parent", FIRST_GUEST_CID, LAST_GUEST_CID) or 0,
            reported_cid=request.integer("reported_cid", FIRST_GUEST_CID, LARGEST) or 0,
        )
        lease = bool(request.boolean("lease"))
        context = self._handlers.contexts.add(
            wanted, lease, profile_given="profile" in request.values
        )
        if lease:
            self._leases.append(context)
        return self._row(context)

    def _change_context(self, request: Table) -> dict[str, Any]:
        context = self._handlers.broker.fabric.contexts.require(_cid(request))
        change = Change(_choice(request, "change", Change))
        left = self._handlers.contexts.change(context, change)
        names = reports.streams_left(self._handlers.broker, left)
        return {"context": self._row(context), "streams_left": names}

    def _remove_context(self, request: Table) -> None:
        self._handlers.contexts.remove(_cid(request))

    def _attach_device(self, request: Table) -> None:
        """Attach a device; its link is sent with the reply (:mod:`.device_link`)."""
        broker = self._handlers.broker
        context = broker.fabric.contexts.require(_cid(request))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            seqpacket = bool(request.boolean("seqpacket"))
            owner = peer_credentials(self._sock)
            host_ports = bool(request.boolean("host_ports"))
            DeviceLink(self._loop, broker, context, ours, owner, seqpacket, host_ports)
        except (Refused, ConfigurationError):
            ours.close()
            theirs.close()
            raise
        self._descriptors.append(theirs.detach())

    def _attach_played_host(self, request: Table) -> None:
        """Attach a played hypervisor; its link is sent with the reply."""
        broker = self._handlers.broker
        context = broker.fabric.contexts.require(_cid(request))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            PlayedHostLink(self._loop, broker, context, ours, peer_credentials(self._sock))
        except Refused:
            ours.close()
            theirs.close()
            raise
        self._descriptors.append(theirs.detach())

    # Streams

    def _disconnect(self, request: Table) -> dict[str, Any]:
        ends = _address(request, "local"), _address(request, "peer")
        left = self._handlers.contexts.disconnect(*ends, peer_credentials(self._sock))
        return {"streams_left": reports.streams_left(self._handlers.broker, left)}

    # Events

    def _subscribe(self, request: Table) -> None:
        topics = request.texts("topics")
        for index, topic in enumerate(topics or ()):
            if topic not in _values(Topic):
                problem = f"{shown(topic)} is unknown, expected {one_of(_values(Topic))}"
                raise request.error(problem, "topics", index)
        if not topics:
            raise request.error(f"expected a list of {one_of(_values(Topic))}", "topics")
        wanted = [Topic(topic) for topic in topics]
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, EVENTS_UNREAD_MAX_BYTES)
        self._handlers.events.subscribe(self._send_event, wanted)

    def _send_event(self, event: Mapping[str, Any]) -> None:
        """Send an event if the socket has space; ``missed`` counts those left out before it."""
        line = json.dumps({"event": {**event, "missed": self._missed}}).encode() + b"\n"
        try:
            # A unix stream socket accepts a short write as a whole or not at all.
            self._sock.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._missed += 1
        except OSError:
            pass  # the connection is closed: its reader gets end of file
        else:
            self._missed = 0


def _read_request(line: bytes) -> Table:
    """Return a request's arguments; those that are null count as missing.

    Raises ConfigurationError when ``line`` is not a JSON object.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError("", None, "", f"not a line of JSON: {error}") from None
    if not isinstance(request, dict):
        raise ConfigurationError("", None, "", f"{kind(request)}, expected a JSON object")
    given = {key: value for key, value in request.items() if value is not None}
    return Table(None, {}, (), given)


def _cid(request: Table) -> int:
    cid = request.integer("cid", 0, LARGEST)
    if cid is None:
        raise request.error("missing, expected a CID", "cid")
    return cid


def _address(request: Table, key: str) -> tuple[int, int]:
    address = request.values.get(key)
    if (
        not isinstance(address, list)
        or len(address) != 2
        or not all(type(number) is int and 0 <= number <= LARGEST for number in address)
    ):
        raise request.error(f"expected [CID, port], two numbers from 0 to {LARGEST}", key)
    return address[0], address[1]


def _choice(request: Table, key: str, choices: type[Enum]) -> str:
    choice = request.choice(key, _values(choices))
    if choice is None:
        raise request.error(f"missing, expected {one_of(_values(choices))}", key)
    return choice


def _values(choices: type[Enum]) -> list[str]:
    return [choice.value for choice in choices]
