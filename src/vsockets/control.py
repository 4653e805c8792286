"""Asking vsockd as its administrator: what ``vsock`` does, for programs."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .limits import VSOCKD_REPLY_TIMEOUT_SECONDS
from .state_folder import CONTROL, connect_to, default_folder, wait_to_connect

#: What there are events of.
TOPICS = ("context", "denial", "disconnect")


class Control:
    """A connection to the vsockd of a state folder.

    Raises OSError: ENODEV when none runs there, else with the errno and words of vsockd.
    Contexts added with ``lease=True`` last as long as this connection.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self._sock = _connect(self.folder)
        self._answers = self._sock.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and the leases made on it."""
        self._answers.close()
        self._sock.close()

    def fileno(self) -> int:
        """The connection's descriptor; whoever has a copy of it keeps the leases."""
        return self._sock.fileno()

    def status(self) -> dict[str, Any]:
        """Facts about the daemon: pid, folder, uptime in seconds, and counts."""
        return self._ask("status")  # type: ignore[no-any-return]

    def sockets(self) -> list[dict[str, Any]]:
        """Every socket of the fabric, one row for each end of a stream.

        ``accepted`` tells the accepting end of a stream from the connecting one.
        ``receive_queue`` and ``send_queue`` are, as for ``ss``, bytes that wait; of a listening
        socket the connections that wait to be accepted, and how many may.  Those of a stream are
        None: the kernel knows, by ``inode`` or ``peer_inode``, whichever is not None.
        """
        return self._ask("sockets")  # type: ignore[no-any-return]

    def counts(self) -> dict[str, Any]:
        """What happened, to make rates of: ``contexts``, a row for each, and ``departed``, the
        sums of leased contexts that have ended.

        ``connects`` and ``accepts`` are streams that its programs began and got, and that were
        begun to it; ``refusals`` are requests answered with an errno, ``denials`` those of them
        that a rule was against, by rule.  They only rise.  ``sockets`` and ``streams`` are those
        it has now.
        """
        return self._ask("counts")  # type: ignore[no-any-return]

    def contexts(self) -> list[dict[str, Any]]:
        """The contexts programs can be in: cid, name, owner (user id), folder, ports."""
        return self._ask("context.list")  # type: ignore[no-any-return]

    def add_context(
        self,
        cid: int | None = None,
        name: str = "",
        owner: int | None = None,
        lease: bool = False,
        *,
        profile: str | None = None,
        unrestricted: bool | None = None,
        domain: str | None = None,
        limits: Mapping[str, int] | None = None,
        powered: bool = True,
        hybrid: str | os.PathLike[str] | None = None,
        reserved_ports: bool = False,
    ) -> dict[str, Any]:
        """A new guest; without ``cid`` it gets a free one.  Returns its row of
        :meth:`contexts`; OSError EEXIST or EINVAL.

        ``profile`` is ``default``, ``restricted`` or ``legacy``; ``unrestricted`` and ``domain``
        go with ``legacy`` (docs/security.md).  ``limits`` are those that are not the default.
        ``hybrid`` is where tools of hybrid vsock find it (docs/hybrid.md): an absolute path.
        With ``reserved_ports`` its programs may bind ports below 1024 without a privilege; EPERM
        for a guest of another user than the fabric's owner.
        """
        return self._ask(  # type: ignore[no-any-return]
            "context.add",
            cid=cid,
            name=name,
            owner=owner,
            lease=lease,
            profile=profile,
            unrestricted=unrestricted,
            domain=domain,
            limits=None if limits is None else dict(limits),
            powered=powered,
            hybrid=None if hybrid is None else os.fspath(hybrid),
            reserved_ports=reserved_ports,
        )

    def remove_context(self, cid: int) -> None:
        """Forget a guest.  OSError ENOENT, EINVAL (the host), EBUSY (it has open streams)."""
        self._ask("context.remove", cid=cid)

    def attach_device(
        self, cid: int, seqpacket: bool = False, host_ports: bool = False
    ) -> socket.socket:
        """Speak for the kernel of a virtual machine: a link to vsockd
        (:mod:`vsockets.devices.client`).  With ``seqpacket`` it has sockets of that type, too;
        with ``host_ports`` the link tells which ports of the host it can connect to.
        OSError ENOENT, EINVAL, EBUSY (it has a device).
        """
        request = {"op": "context.device", "cid": cid}
        request |= {"seqpacket": seqpacket, "host_ports": host_ports}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        line, fds, _, _ = socket.recv_fds(self._sock, 65_536, 1)
        answer = json.loads(line) if line else {"error": "vsockd has gone", "errno": errno.ENODEV}
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        return socket.socket(fileno=fds[0])

    # What happens to virtual machines.  Each returns ``{"context": its row of contexts(),
    # "streams_left": [...]}``, where the list is empty unless vsockd may not end a stream of
    # some process; OSError ENOENT, or EINVAL when it cannot be done in the context's state.

    def suspend(self, cid: int) -> dict[str, Any]:
        """Drop its connections; nothing gets in or out until :meth:`resume`."""
        return self._change(cid, "suspend")

    def resume(self, cid: int) -> dict[str, Any]:
        """After :meth:`suspend`."""
        return self._change(cid, "resume")

    def migrate(self, cid: int) -> dict[str, Any]:
        """Drop its connections, as live migration does."""
        return self._change(cid, "migrate")

    def reset(self, cid: int) -> dict[str, Any]:
        """Drop its connections, because its machine was reset."""
        return self._change(cid, "reset")

    def fault_tolerance(self, cid: int, on: bool) -> dict[str, Any]:
        """Put it into FT mode, which drops its connections and allows no new ones, or out."""
        return self._change(cid, "ft-on" if on else "ft-off")

    def power_off(self, cid: int) -> dict[str, Any]:
        """Drop its connections, take back every port, and let no program in."""
        return self._change(cid, "power-off")

    def power_on(self, cid: int) -> dict[str, Any]:
        """After :meth:`power_off`, or when it was added with ``powered=False``."""
        return self._change(cid, "power-on")

    def disconnect(self, local: tuple[int, int], peer: tuple[int, int]) -> dict[str, Any]:
        """End the stream between two addresses, whichever of them began it.

        Returns ``{"streams_left": [...]}`` as above; OSError ENOENT when there is none.
        """
        return self._ask(  # type: ignore[no-any-return]
            "stream.disconnect", local=list(local), peer=list(peer)
        )

    def reload(self) -> None:
        """Read the configuration again.  OSError EINVAL with file, line and key when it is
        wrong; then the old one stays in force.
        """
        self._ask("reload")

    def events(self, *topics: str) -> Events:
        """What happens from now on: one of :data:`TOPICS`, by default all."""
        return Events(self.folder, topics or TOPICS)

    def stop(self) -> None:
        """Shut vsockd down; returns when it has gone."""
        self._ask("stop")
        while self._answers.readline():
            pass

    def _change(self, cid: int, change: str) -> dict[str, Any]:
        return self._ask("context.change", cid=cid, change=change)  # type: ignore[no-any-return]

    def _ask(self, op: str, **arguments: Any) -> Any:
        self._sock.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
        try:
            line = self._answers.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise OSError(errno.ENODEV, f"the vsockd of {self.folder} has gone")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        return answer["ok"]


class Events:
    """Events as they happen: an iterator, also for ``async for``, of JSON objects.

    Each has ``topic``, ``time`` (seconds since the epoch) and ``missed``: how many came before it
    and were lost, because they were not read soon enough.  With topic ``context``: ``cid``,
    ``name``, ``change`` (``added``, ``removed``, ``suspend``, ...), ``state``, ``ft`` and
    ``dropped`` (connections).  With topic ``denial``: what docs/security.md lists.
    ``disconnect``, a stream an administrator has ended: ``source``, ``destination``, and ``pid``,
    ``uid`` and ``gid`` of who asked.  Ends when vsockd does.
    """

    def __init__(self, folder: Path, topics: tuple[str, ...]) -> None:
        self._sock = _connect(folder)
        self._received = b""
        try:
            request = {"op": "subscribe", "topics": list(topics)}
            self._sock.sendall(json.dumps(request).encode() + b"\n")
            answer = self._next_line(VSOCKD_REPLY_TIMEOUT_SECONDS) or {}
            if "error" in answer:
                raise OSError(answer["errno"], answer["error"])
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hear no more."""
        self._sock.close()

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """The next event; TimeoutError after ``timeout`` seconds, EOFError when vsockd ends."""
        line = self._next_line(timeout)
        if line is None:
            raise EOFError("vsockd has ended")
        return line["event"]  # type: ignore[no-any-return]

    def fileno(self) -> int:
        """The connection's descriptor, to wait for with others."""
        return self._sock.fileno()

    def take(self) -> list[dict[str, Any]] | None:
        """The events that have come, without waiting; None when vsockd has ended."""
        self._sock.setblocking(False)  # with a timeout set Python would wait, MSG_DONTWAIT or not
        try:
            data = self._sock.recv(65_536)
        except BlockingIOError:
            data = b""
        else:
            if not data:
                return None
        self._received += data
        events = []
        while (line := self._take_line()) is not None:
            events.append(line["event"])
        return events

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            return self.wait()
        except EOFError:
            raise StopIteration from None

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        import asyncio  # here, because it takes long to load and few need it

        self._sock.setblocking(False)
        while (line := self._take_line()) is None:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65_536)
            if not data:
                raise StopAsyncIteration
            self._received += data
        return line["event"]  # type: ignore[no-any-return]

    def _next_line(self, timeout: float | None) -> dict[str, Any] | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (line := self._take_line()) is None:
            # Not 0, which would be another mode.
            left = None if deadline is None else max(1e-6, deadline - time.monotonic())
            self._sock.settimeout(left)
            data = self._sock.recv(65_536)
            if not data:
                return None
            self._received += data
        return line

    def _take_line(self) -> dict[str, Any] | None:
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return json.loads(line)  # type: ignore[no-any-return]


def _connect(folder: Path) -> socket.socket:
    """A connection to the administrator's socket of the vsockd in ``folder``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(VSOCKD_REPLY_TIMEOUT_SECONDS)
    path = os.fspath(folder / CONTROL)
    try:
        try:
            connect_to(sock.connect, path)
        except BlockingIOError:
            wait_to_connect(sock, path, VSOCKD_REPLY_TIMEOUT_SECONDS)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        raise OSError(errno.ENODEV, f"no vsockd runs in {folder} (start it: vsock up)") from None
    except BaseException:
        sock.close()
        raise
    return sock
