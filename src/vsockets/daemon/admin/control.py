"""The administrator's socket: JSON objects as requests and replies, one per line.

``{"op": "context.add", "cid": 3}`` is answered by ``{"ok": …}`` or by
``{"error": "…", "errno": 17}``.  The socket's mode admits the fabric's owner and root.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ..._linux.folders import file_mode
from ..._linux.sockets import refuse_descriptors
from ...eventloop.acceptor import Acceptor
from ...eventloop.loop import EventLoop
from ...fabric import Change, Context, ContextSettings, Isolation, Limits, Profile, Refused
from ...model.address import LARGEST
from ...model.locator import check_hybrid_path
from ...state_folder import short_path
from ..broker import Broker
from ..configuration import ConfigurationError
from ..context_manager import ContextManager
from ..credentials import peer_credentials
from ..device_link import DeviceLink
from ..limits import CONTROL_REQUEST_MAX_BYTES, EVENTS_UNREAD_MAX_BYTES
from . import reports
from .events import Events, Topic

Arguments = Mapping[str, Any]


class BadRequest(Exception):
    """An invalid request; the text says what was expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class ControlHandlers:
    """The parts and operations of vsockd that administrators may use."""

    broker: Broker
    contexts: ContextManager
    events: Events
    status: Callable[[], dict[str, Any]]
    reload: Callable[[], None]
    stop: Callable[[], None]


class ControlSocket:
    """The listening socket at ``path``; a connection may carry any number of requests."""

    def __init__(self, loop: EventLoop, handlers: ControlHandlers, path: Path) -> None:
        self._loop = loop
        self._handlers = handlers
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        refuse_descriptors(listener)
        with short_path(path) as spelled, file_mode(0o600):
            listener.bind(spelled)
        listener.listen()
        self._acceptor = Acceptor(loop, listener, "an administrator", self._admit)

    def close(self) -> None:
        """Stop accepting connections."""
        self._acceptor.close()

    def _admit(self, fd: int) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        ControlSession(self._loop, self._handlers, sock)


class ControlSession:
    """One administrator's connection, and the leases that end with it."""

    def __init__(self, loop: EventLoop, handlers: ControlHandlers, sock: socket.socket) -> None:
        self._loop = loop
        self._handlers = handlers
        self._sock = sock
        self._received = b""
        self._leases: list[Context] = []
        self._operations: dict[str, Callable[[Arguments], Any]] = {
            "status": lambda _: handlers.status(),
            "counts": lambda _: reports.counts(handlers.broker),
            "sockets": lambda _: reports.socket_rows(handlers.broker),
            "context.list": self._list_contexts,
            "context.add": self._add_context,
            "context.change": self._change_context,
            "context.remove": self._remove_context,
            "context.device": self._attach_device,
            "stream.disconnect": self._disconnect,
            "reload": lambda _: handlers.reload(),
            "subscribe": self._subscribe,
            "stop": lambda _: handlers.stop(),
        }
        self._missed = 0
        self._descriptors: list[int] = []  # to send with the next reply
        loop.watch(sock.fileno(), self._ready)

    def _ready(self, events: int) -> None:
        try:
            data = self._sock.recv(CONTROL_REQUEST_MAX_BYTES)
        except (BlockingIOError, ConnectionError):
            data = b""
        self._received += data
        if not data or len(self._received) > CONTROL_REQUEST_MAX_BYTES:
            self._close()
            return
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            answer = json.dumps(self._answer(line)).encode() + b"\n"
            # Replies fit the socket's buffer, or vsockd waits for the administrator to read.
            self._sock.settimeout(1.0)
            try:
                if self._descriptors:
                    socket.send_fds(self._sock, [answer], self._descriptors)
                else:
                    self._sock.sendall(answer)
            except OSError:
                self._close()
                return
            finally:
                while self._descriptors:
                    os.close(self._descriptors.pop())
            self._sock.setblocking(False)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            try:
                request = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"not a line of JSON: {error}") from None
            op = request.get("op") if isinstance(request, dict) else None
            if not isinstance(op, str) or op not in self._operations:
                raise BadRequest(f"expected an object with op one of {sorted(self._operations)}")
            return {"ok": self._operations[op](request)}
        except (BadRequest, ConfigurationError) as error:
            return {"error": str(error), "errno": errno.EINVAL}
        except Refused as refused:
            return {"error": refused.reason, "errno": refused.errno}
        except OSError as error:
            return {"error": str(error), "errno": error.errno}

    def _close(self) -> None:
        self._loop.unwatch(self._sock.fileno())
        self._handlers.events.unsubscribe(self._send_event)
        self._sock.close()
        for context in self._leases:
            self._handlers.contexts.end_lease(context)

    # Contexts

    def _list_contexts(self, _: Arguments) -> list[dict[str, Any]]:
        self._handlers.broker.refresh()
        self._handlers.broker.recount_pending()
        contexts = sorted(self._handlers.broker.fabric.contexts, key=lambda context: context.cid)
        return [self._row(context) for context in contexts if context.cid]

    def _row(self, context: Context) -> dict[str, Any]:
        folder = self._handlers.contexts.folder_of(context)
        return reports.context_row(self._handlers.broker, context, folder)

    def _add_context(self, arguments: Arguments) -> dict[str, Any]:
        owner = _optional(arguments, "owner", int)
        if owner is not None and not 0 <= owner < LARGEST:
            raise BadRequest(f"owner: expected a user id, not {owner}")
        powered = _optional(arguments, "powered", bool)
        wanted = ContextSettings(
            cid=_optional(arguments, "cid", int),
            name=_optional(arguments, "name", str) or "",
            owner=owner,
            isolation=_isolation(arguments),
            limits=_limits(arguments, self._handlers.broker.fabric.settings.limits),
            powered=powered is not False,
            hybrid=_hybrid(arguments),
            reserved_ports=bool(_optional(arguments, "reserved_ports", bool)),
        )
        lease = bool(_optional(arguments, "lease", bool))
        context = self._handlers.contexts.add(
            wanted, lease, profile_given=arguments.get("profile") is not None
        )
        if lease:
            self._leases.append(context)
        return self._row(context)

    def _change_context(self, arguments: Arguments) -> dict[str, Any]:
        context = self._handlers.broker.fabric.contexts.require(_cid(arguments))
        change = _choice(arguments, "change", Change)
        left = self._handlers.contexts.change(context, change)
        return {"context": self._row(context), "streams_left": reports.stream_names(left)}

    def _remove_context(self, arguments: Arguments) -> None:
        self._handlers.contexts.remove(_cid(arguments))

    def _attach_device(self, arguments: Arguments) -> None:
        """Attach a device; its link is sent with the reply (:mod:`.device_link`)."""
        broker = self._handlers.broker
        context = broker.fabric.contexts.require(_cid(arguments))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            seqpacket = bool(_optional(arguments, "seqpacket", bool))
            owner = peer_credentials(self._sock)
            host_ports = bool(_optional(arguments, "host_ports", bool))
            DeviceLink(self._loop, broker, context, ours, owner, seqpacket, host_ports)
        except (Refused, BadRequest):
            ours.close()
            theirs.close()
            raise
        self._descriptors.append(theirs.detach())

    # Streams

    def _disconnect(self, arguments: Arguments) -> dict[str, Any]:
        ends = _address(arguments, "local"), _address(arguments, "peer")
        left = self._handlers.contexts.disconnect(*ends, peer_credentials(self._sock))
        return {"streams_left": reports.stream_names(left)}

    # Events

    def _subscribe(self, arguments: Arguments) -> None:
        topics = arguments.get("topics")
        if not isinstance(topics, list) or not topics:
            raise BadRequest(f"topics: expected a list of {_names(Topic)}, not {topics!r}")
        wanted = [_choice({"topics": topic}, "topics", Topic) for topic in topics]
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
            pass  # closed; the reader notices
        else:
            self._missed = 0


def _cid(arguments: Arguments) -> int:
    cid: int | None = _optional(arguments, "cid", int)
    if cid is None:
        raise BadRequest("cid: expected a number")
    return cid


def _address(arguments: Arguments, key: str) -> tuple[int, int]:
    address = _optional(arguments, key, list)
    if (
        address is None
        or len(address) != 2
        or not all(type(number) is int and 0 <= number <= LARGEST for number in address)
    ):
        raise BadRequest(f"{key}: expected [CID, port], two numbers from 0 to {LARGEST}")
    return address[0], address[1]


def _hybrid(arguments: Arguments) -> str:
    path: str = _optional(arguments, "hybrid", str) or ""
    problem = check_hybrid_path(path) if path else ""
    if problem:
        raise BadRequest(f"hybrid: {problem}")
    return path


def _isolation(arguments: Arguments) -> Isolation:
    profile = Profile.DEFAULT
    if arguments.get("profile") is not None:
        profile = _choice(arguments, "profile", Profile)
    unrestricted = _optional(arguments, "unrestricted", bool)
    domain = _optional(arguments, "domain", str)
    if profile is not Profile.LEGACY and (unrestricted is not None or domain is not None):
        raise BadRequest("unrestricted, domain: used by the legacy profile only")
    return Isolation(profile, bool(unrestricted), domain or "")


def _limits(arguments: Arguments, default: Limits) -> Limits:
    given = _optional(arguments, "limits", dict) or {}
    names = [field.name for field in dataclasses.fields(Limits)]
    for name, value in given.items():
        if name not in names:
            raise BadRequest(f"limits: expected some of {', '.join(names)}, not {name!r}")
        if type(value) is not int or value < 1:
            raise BadRequest(f"limits: {name}: expected a number from 1 up, not {value!r}")
    return dataclasses.replace(default, **given)


_Choice = TypeVar("_Choice", bound=Enum)


def _choice(arguments: Arguments, key: str, choices: type[_Choice]) -> _Choice:
    value = arguments.get(key)
    try:
        return choices(value)
    except ValueError:
        raise BadRequest(f"{key}: expected one of {_names(choices)}, not {value!r}") from None


def _names(choices: type[Enum]) -> str:
    return ", ".join(choice.value for choice in choices)


def _optional(arguments: Arguments, key: str, kind: type) -> Any:
    value = arguments.get(key)
    if value is not None and type(value) is not kind:  # not isinstance: True is not a number
        raise BadRequest(f"{key}: expected {kind.__name__}, not {value!r}")
    return value
