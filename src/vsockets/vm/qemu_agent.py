"""A client of QEMU's guest agent (``qemu-ga``), which a guest runs at a vSockets port.

Requests and replies are lines of JSON.  The guest is hostile: a reply is read to a limit, and each
value in it is checked before it is used.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import socket as stdlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..eventloop.retry import Backoff
from ..model.text import printable
from .limits import (
    VM_AGENT_CHUNK_BYTES,
    VM_AGENT_ERROR_MAX_CHARACTERS,
    VM_AGENT_POLL_MAX_SECONDS,
    VM_AGENT_REPLY_MAX_BYTES,
    VM_AGENT_REPLY_SECONDS,
    VM_AGENT_SYNC_SECONDS,
    VM_AGENT_SYNC_SKIPPED_MAX,
)

#: The port at which this package expects the agent; users other than root cannot bind it in a
#: guest, so none of them can play the agent.
AGENT_PORT = 970

#: A byte that is in no JSON: the agent drops what it has of a request, and begins its reply so.
_SENTINEL = b"\xff"

_FIRST_PAUSE_SECONDS = 0.02


class AgentFailed(Exception):
    """A request that the agent refused, or an invalid reply; the message says which."""


class AgentClosed(AgentFailed):
    """The agent has closed the connection."""


@dataclass(frozen=True)
class Finished:
    """A program that has ended in the guest."""

    status: int  #: as a shell has it: 128 plus the number of the signal that ended it
    output: bytes
    errors: bytes
    is_cut: bool  #: the agent has not kept all of the output


class QemuAgent:
    """A connection to a guest's agent, which serves one at a time; a context manager."""

    def __init__(self, sock: stdlib.socket) -> None:
        """Begin a session on a connected socket, and take ownership of it.

        Raises OSError, or AgentFailed when the agent does not answer.
        """
        self._sock = sock
        self._received = bytearray()
        try:
            self._synchronize()
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> QemuAgent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sock.close()

    # Programs

    def run(self, command: list[str], given: bytes = b"") -> Finished:
        """Run a program in the guest, with ``given`` as its standard input, until it ends.

        Raises AgentFailed or OSError.
        """
        arguments: dict[str, object] = {
            "path": command[0],
            "arg": command[1:],
            "capture-output": True,
        }
        if given:
            arguments["input-data"] = base64.b64encode(given).decode()
        pid = _integer(self.call("guest-exec", arguments), "pid")
        backoff = Backoff(_FIRST_PAUSE_SECONDS, VM_AGENT_POLL_MAX_SECONDS)
        while True:
            state = self.call("guest-exec-status", {"pid": pid})
            if _boolean(state, "exited"):
                return _finished(state)
            time.sleep(backoff.next_pause())

    def reboot(self) -> None:
        """Ask the guest to shut down and boot again.

        Raises AgentFailed, also when the guest refuses, or OSError.
        """
        # A shutdown has a reply only if it fails, so that of the next request reports success; a
        # connection that ends does so with the guest.
        with contextlib.suppress(AgentClosed, ConnectionError):
            self._send("guest-shutdown", {"mode": "reboot"})
            self.call("guest-ping", {}, "guest-shutdown")

    # Files

    def read_file(self, path: str, most: int) -> Iterator[bytes]:
        """Yield the contents of a file of the guest.

        Raises AgentFailed, also for a file of more than ``most`` bytes, or OSError.
        """
        handle = self._open(path, "r")
        size, is_end = 0, False
        while not is_end:
            reply = self.call("guest-file-read", {"handle": handle, "count": VM_AGENT_CHUNK_BYTES})
            is_end = _boolean(reply, "eof")
            data = _data(reply, "buf-b64")
            if len(data) > VM_AGENT_CHUNK_BYTES or not (data or is_end):
                raise AgentFailed(
                    f"the agent has sent {len(data)} bytes of a file (expected 1 to "
                    f"{VM_AGENT_CHUNK_BYTES})"
                )
            size += len(data)
            if size > most:
                break
            yield data
        self.call("guest-file-close", {"handle": handle})
        if size > most:
            raise AgentFailed(f"{path} is larger than {most} bytes (--limit sets another limit)")

    def write_file(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a file of the guest, replacing its contents.

        Raises AgentFailed or OSError.
        """
        handle = self._open(path, "w")
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                part = view[:VM_AGENT_CHUNK_BYTES]
                encoded = base64.b64encode(part).decode()
                reply = self.call("guest-file-write", {"handle": handle, "buf-b64": encoded})
                written = _integer(reply, "count")
                if not 0 < written <= len(part):
                    raise AgentFailed(
                        f"the agent has written {written} bytes (expected 1 to {len(part)})"
                    )
                view = view[written:]
        self.call("guest-file-flush", {"handle": handle})
        self.call("guest-file-close", {"handle": handle})

    def _open(self, path: str, mode: str) -> int:
        return _number(self.call("guest-file-open", {"path": path, "mode": mode}), "handle")

    # Messages

    def call(self, name: str, arguments: dict[str, object], shown: str = "") -> Any:
        """Return the result of a command of the agent.

        ``shown`` is the command that an error names instead of this one.

        Raises AgentFailed or OSError.
        """
        shown = shown or name
        try:
            self._sock.settimeout(VM_AGENT_REPLY_SECONDS)
            self._send(name, arguments)
            reply = _loaded(self._line(time.monotonic() + VM_AGENT_REPLY_SECONDS))
        except TimeoutError:
            limit = f"{VM_AGENT_REPLY_SECONDS:g} s"
            raise AgentFailed(f"{shown}: no reply within {limit}") from None
        return _result(shown, reply)

    def _synchronize(self) -> None:
        """Discard an earlier client's unfinished request, and the agent's reply to it."""
        number = secrets.randbelow(1 << 31)
        deadline = time.monotonic() + VM_AGENT_SYNC_SECONDS
        try:
            self._sock.settimeout(VM_AGENT_SYNC_SECONDS)
            self._send("guest-sync-delimited", {"id": number}, _SENTINEL)
            for _ in range(VM_AGENT_SYNC_SKIPPED_MAX):
                line = self._line(deadline)
                if _SENTINEL in line and _loaded(line.rpartition(_SENTINEL)[2]) == {
                    "return": number
                }:
                    return
        except TimeoutError:
            raise AgentFailed(
                "the guest agent does not answer (it serves one client at a time)"
            ) from None
        raise AgentFailed("the guest agent does not answer what it was asked")

    def _send(self, name: str, arguments: dict[str, object], before: bytes = b"") -> None:
        request = {"execute": name, "arguments": arguments}
        self._sock.sendall(before + json.dumps(request).encode() + b"\n")

    def _line(self, deadline: float) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > VM_AGENT_REPLY_MAX_BYTES:
                raise AgentFailed(
                    f"a reply of more than {VM_AGENT_REPLY_MAX_BYTES} bytes from the agent"
                )
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._sock.recv(1 << 18)
            if not data:
                raise AgentClosed("the guest agent has closed the connection")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def _loaded(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise AgentFailed("malformed reply from the guest agent (expected JSON)") from None


def _result(name: str, reply: Any) -> Any:
    match reply:
        case {"return": result}:
            return result
        case {"error": {"desc": str(text)}}:
            shown = printable(text[:VM_AGENT_ERROR_MAX_CHARACTERS])
            raise AgentFailed(f"{name}: the guest agent refuses: {shown}")
    raise AgentFailed(f"{name}: malformed reply from the guest agent (expected return or error)")


def _finished(state: Any) -> Finished:
    if "signal" in state:
        status = 128 + min(_integer(state, "signal"), 127)
    else:
        status = min(_integer(state, "exitcode"), 255)  # Windows has larger ones
    cut = any(state.get(name) is True for name in ("out-truncated", "err-truncated"))
    return Finished(status, _data(state, "out-data"), _data(state, "err-data"), cut)


def _integer(reply: Any, name: str) -> int:
    """Return the non-negative number ``name`` of a reply."""
    value = _number(reply.get(name) if isinstance(reply, dict) else None, name)
    if value < 0:
        raise AgentFailed(f"the guest agent has sent {name} {value} (expected a number from 0)")
    return value


def _number(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 63:
        raise AgentFailed(f"the guest agent has sent no valid {name} (expected a number)")
    return value


def _boolean(reply: Any, name: str) -> bool:
    value = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(value, bool):
        raise AgentFailed(f"the guest agent has sent no valid {name} (expected true or false)")
    return value


def _data(reply: dict[str, Any], name: str) -> bytes:
    """Return the bytes of a reply, which has them in base64; b"" without them."""
    try:
        return base64.b64decode(reply.get(name, ""), validate=True)
    except (ValueError, TypeError):
        raise AgentFailed(f"the guest agent has sent no valid {name} (expected base64)") from None
