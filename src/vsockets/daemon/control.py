"""The administrator's socket: one JSON object a line, answered by one.

``{"op": "context.add", "cid": 3}`` is answered by ``{"ok": …}`` or by
``{"error": "…", "errno": 17}``.  The socket's mode lets in the fabric's owner and root.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..address import LARGEST
from ..fabric import Context, Refused
from ..limits import CONTROL_REQUEST
from ..state_folder import short_path
from .accepting import Acceptor
from .loop import Loop

if TYPE_CHECKING:
    from .vsockd import Vsockd

Arguments = Mapping[str, Any]


class BadRequest(Exception):
    """A request that is not one; the text says what was expected."""


class ControlSocket:
    """Listens at ``path``; every connection may ask any number of questions."""

    def __init__(self, loop: Loop, vsockd: Vsockd, path: Path) -> None:
        self._loop = loop
        self._vsockd = vsockd
        self._path = path
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with short_path(path) as spelled:
            listener.bind(spelled)
        path.chmod(0o600)
        listener.listen()
        self._acceptor = Acceptor(loop, listener, "an administrator", self._admit)

    def close(self) -> None:
        """Answer nobody any more."""
        self._acceptor.close()
        self._path.unlink(missing_ok=True)

    def _admit(self, fd: int) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        Session(self._loop, self._vsockd, sock)


class Session:
    """One administrator's connection, and the leases that end with it."""

    def __init__(self, loop: Loop, vsockd: Vsockd, sock: socket.socket) -> None:
        self._loop = loop
        self._vsockd = vsockd
        self._sock = sock
        self._received = b""
        self._leases: list[Context] = []
        self._operations: dict[str, Callable[[Arguments], Any]] = {
            "status": lambda _: vsockd.status(),
            "sockets": lambda _: vsockd.sockets(),
            "context.list": lambda _: vsockd.contexts(),
            "context.add": self._add_context,
            "context.remove": self._remove_context,
            "stop": lambda _: vsockd.stop(),
        }
        loop.watch(sock.fileno(), self._ready)

    def _ready(self, events: int) -> None:
        try:
            data = self._sock.recv(CONTROL_REQUEST)
        except (BlockingIOError, ConnectionError):
            data = b""
        self._received += data
        if not data or len(self._received) > CONTROL_REQUEST:
            self._close()
            return
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            answer = json.dumps(self._answer(line)).encode() + b"\n"
            # Answers fit the socket's buffer, or the administrator waits for the rest.
            self._sock.settimeout(1.0)
            try:
                self._sock.sendall(answer)
            except OSError:
                self._close()
                return
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
        except BadRequest as error:
            return {"error": str(error), "errno": errno.EINVAL}
        except Refused as refused:
            return {"error": refused.rule, "errno": refused.errno}
        except OSError as error:
            return {"error": str(error), "errno": error.errno}

    def _close(self) -> None:
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()
        for context in self._leases:
            self._vsockd.end_lease(context)

    def _add_context(self, arguments: Arguments) -> dict[str, Any]:
        cid = _optional(arguments, "cid", int)
        name = _optional(arguments, "name", str) or ""
        owner = _optional(arguments, "owner", int)
        if owner is not None and not 0 <= owner < LARGEST:
            raise BadRequest(f"owner: expected a user id, not {owner}")
        lease = bool(_optional(arguments, "lease", bool))
        context = self._vsockd.add_context(
            cid, name, os.geteuid() if owner is None else owner, lease
        )
        if lease:
            self._leases.append(context)
        return self._vsockd.describe_context(context)

    def _remove_context(self, arguments: Arguments) -> None:
        cid = _optional(arguments, "cid", int)
        if cid is None:
            raise BadRequest("cid: expected a number")
        self._vsockd.remove_context(cid)


def _optional(arguments: Arguments, key: str, kind: type) -> Any:
    value = arguments.get(key)
    if value is not None and type(value) is not kind:  # not isinstance: True is no number
        raise BadRequest(f"{key}: expected {kind.__name__}, not {value!r}")
    return value
