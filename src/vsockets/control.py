"""Administration of vsockd from a Python program, with the operations of ``vsock``."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from .limits import VSOCKD_REPLY_TIMEOUT_SECONDS
from .state_folder import CONTROL, connect_to, default_folder, how_to_start, wait_to_connect

#: The topics of events.
TOPICS = ("context", "denial", "disconnect", "vsockd")


class Control:
    """A connection to the vsockd of a state folder, by default the user's or root's own.

    Contexts added with ``lease=True`` exist as long as this connection.

    Raises OSError: ENODEV if vsockd is not running, else the errno and message of vsockd.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self._sock = _connect(self.folder)
        self._replies = self._sock.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which ends its leases."""
        self._replies.close()
        self._sock.close()

    def fileno(self) -> int:
        """Return the connection's descriptor.  Leases last until its last duplicate is closed."""
        return self._sock.fileno()

    def status(self) -> dict[str, Any]:
        """Return the state of vsockd.

        The result has vsockd's pid, folder, configuration and uptime in seconds, and the numbers of
        contexts, streams, listeners, datagram sockets, refusals, denials and open descriptors.
        """
        return self._report("status")[1]  # type: ignore[no-any-return]

    def sockets(self) -> list[dict[str, Any]]:
        """Return every socket of the fabric, with one row for each end of a stream.

        ``accepted`` is true for the accepting end of a stream, false for the connecting end.
        ``receive_queue`` and ``send_queue`` are queued bytes, as in ``ss``; for a listening socket,
        the connections not yet accepted and their limit.  For a stream both are None: the kernel
        reports its queues (as ``ss`` does) under ``inode`` or ``peer_inode``, whichever is not
        None.

        ``bytes_sent``, ``bytes_received`` and, per second, ``send_rate`` and ``receive_rate`` are
        those that a device or a forwarder has moved and reported; None for other sockets, whose
        bytes the kernel does not count.
        """
        rows, last = self._report("sockets")
        return sorted(rows + last, key=lambda row: (row["context"], row["type"], row["port"]))

    def counts(self) -> dict[str, Any]:
        """Return the counters of all contexts.

        ``contexts`` has a row for each context; ``departed`` has the sums of leased contexts that
        have ended.

        ``connects`` counts streams that the context's programs opened, ``accepts`` streams that
        were opened to the context; ``refusals`` counts requests that failed with an errno, and
        ``denials`` those that a rule denied, by rule.  These counters only increase.  ``sockets``
        and ``streams`` are the current numbers.  The four numbers of bytes are those of
        :meth:`sockets`, summed over all streams of a virtual machine; None in other contexts.
        """
        rows, last = self._report("counts")
        return {**last, "contexts": rows + last["contexts"]}

    def contexts(self) -> list[dict[str, Any]]:
        """Return a row for each context, with cid, name, owner (user id), folder and ports."""
        rows, last = self._report("context.list")
        return rows + last  # type: ignore[no-any-return]

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
        parent: int | None = None,
        reported_cid: int | None = None,
    ) -> dict[str, Any]:
        """Add a guest, by default with an unused CID; return its row of :meth:`contexts`.

        ``profile`` is ``default``, ``restricted`` or ``legacy``; ``unrestricted`` and ``domain``
        apply to ``legacy`` only (docs/security.md).  ``limits`` replaces some default limits.
        ``hybrid`` is the absolute path of the guest's unix socket for hybrid vsock
        (docs/hybrid.md).  ``reserved_ports`` lets the guest's programs bind ports below 1024
        without CAP_NET_BIND_SERVICE.  ``parent`` is the CID of a guest that this guest may
        communicate with in spite of their profiles: the one that has started it, such as the parent
        instance of an enclave.  ``reported_cid`` is the CID that ``/dev/vsock`` reports to programs
        of the guest under ``vsock run``, by default the guest's: VMADDR_CID_ANY on Hyper-V.

        Raises OSError: EEXIST if the CID is in use, EINVAL if a value is invalid, EPERM if
        ``reserved_ports`` is set for a guest of another user than the fabric's owner.
        """
        return self._request(  # type: ignore[no-any-return]
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
            parent=parent,
            reported_cid=reported_cid,
        )

    def remove_context(self, cid: int) -> None:
        """Remove a guest.

        Raises OSError: ENOENT, EINVAL (the host), or EBUSY (the guest has open streams).
        """
        self._request("context.remove", cid=cid)

    def attach_device(
        self, cid: int, seqpacket: bool = False, host_ports: bool = False
    ) -> socket.socket:
        """Return a new connection between the guest's device and vsockd.

        :mod:`vsockets.devices.client` uses the connection.  ``seqpacket``: the guest supports
        SOCK_SEQPACKET as well as streams.  ``host_ports``: the link reports
        the ports of the host that the guest can connect to.

        Raises OSError: ENOENT, EINVAL, or EBUSY (the guest has a device).
        """
        request = {"op": "context.device", "cid": cid}
        request |= {"seqpacket": seqpacket, "host_ports": host_ports}
        return self._request_link(request)

    def attach_played_host(self, cid: int) -> socket.socket:
        """Return a new connection to vsockd for a played hypervisor, which stands for the host.

        Over it arrive the guest's connects to the host's ports on which no program of the fabric
        listens.  :mod:`vsockets.testing` uses the connection.

        Raises OSError: ENOENT, EINVAL, or EBUSY (the guest has hybrid vsock or is played).
        """
        return self._request_link({"op": "context.played", "cid": cid})

    def _request_link(self, request: Mapping[str, Any]) -> socket.socket:
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        line, fds, _, _ = socket.recv_fds(self._sock, 65_536, 1)
        reply = (
            json.loads(line)
            if line
            else {"error": "vsockd has closed the connection", "errno": errno.ENODEV}
        )
        if "error" in reply:
            raise OSError(reply["errno"], reply["error"])
        return socket.socket(fileno=fds[0])

    # Life cycle of virtual machines.  Each method returns ``{"context": the row of contexts(),
    # "streams_left": [...]}``, where the list has the streams that vsockd could not end yet, each
    # with the addresses "local" and "peer", the "pid" that opened it, and a "reason".
    # Each raises OSError: ENOENT, or EINVAL if the context's state does not allow the change.

    def suspend(self, cid: int) -> dict[str, Any]:
        """Drop a context's connections, and refuse new ones until :meth:`resume`."""
        return self._change_state(cid, "suspend")

    def resume(self, cid: int) -> dict[str, Any]:
        """Allow connections of a suspended context again."""
        return self._change_state(cid, "resume")

    def migrate(self, cid: int) -> dict[str, Any]:
        """Drop a context's connections, as live migration of its machine does."""
        return self._change_state(cid, "migrate")

    def reset(self, cid: int) -> dict[str, Any]:
        """Drop a context's connections, as a reset of its machine does."""
        return self._change_state(cid, "reset")

    def fault_tolerance(self, cid: int, on: bool) -> dict[str, Any]:
        """Turn fault tolerance mode on, which drops connections and refuses new ones, or off."""
        return self._change_state(cid, "ft-on" if on else "ft-off")

    def power_off(self, cid: int) -> dict[str, Any]:
        """Drop a context's connections, release its ports, and refuse requests of its programs."""
        return self._change_state(cid, "power-off")

    def power_on(self, cid: int) -> dict[str, Any]:
        """Turn on a context that :meth:`power_off` or ``powered=False`` has turned off."""
        return self._change_state(cid, "power-on")

    def announce_ready(self, cid: int) -> None:
        """Publish the event ``ready`` of a context: its guest has reported that it has started.

        Raises OSError(ENOENT) if the context does not exist.
        """
        self._request("context.ready", cid=cid)

    def disconnect(self, local: tuple[int, int], peer: tuple[int, int]) -> dict[str, Any]:
        """End the stream between two addresses, given in either order.

        Returns ``{"streams_left": [...]}``, with a ``"reason"`` if vsockd could not end the stream.

        Raises OSError(ENOENT) if the stream does not exist.
        """
        return self._request(  # type: ignore[no-any-return]
            "stream.disconnect", local=list(local), peer=list(peer)
        )

    def reload(self) -> None:
        """Have vsockd read its configuration files again.

        Raises OSError(EINVAL) with file, line and key if a file is invalid; vsockd then keeps the
        old configuration.
        """
        self._request("reload")

    def events(self, *topics: str) -> Events:
        """Subscribe to events of some of the :data:`TOPICS`, by default all."""
        return Events(self.folder, topics or TOPICS)

    def replace(self) -> int:
        """Replace vsockd by a new process of what is installed now; return its process id.

        The new process takes over all sockets, streams, guests, leases and subscribers of events.
        Requests made during the replacement wait.

        Raises OSError with the reason when the new process cannot take over; then the present one
        continues.
        """
        pid: int = self._request("replace")["pid"]
        return pid

    def stop(self) -> None:
        """Stop vsockd, and return when vsockd has closed all connections."""
        self._request("stop")
        while self._replies.readline():
            pass

    def _change_state(self, cid: int, change: str) -> dict[str, Any]:
        return self._request("context.change", cid=cid, change=change)  # type: ignore[no-any-return]

    def _report(self, op: str) -> tuple[list[Any], Any]:
        """Return the rows of a report that arrives in parts, and the reply that ends it."""
        deadline = time.monotonic() + VSOCKD_REPLY_TIMEOUT_SECONDS
        while True:
            try:
                rows: list[Any] = []
                reply = self._exchange(op, parts=True)
                while "part" in reply:
                    rows += reply["part"]
                    reply = self._exchange("continue")
            except OSError as error:
                # vsockd was replaced during the report.
                if error.errno != errno.ESTALE or time.monotonic() > deadline:
                    raise
            else:
                return rows, reply["ok"]

    def _request(self, op: str, **arguments: Any) -> Any:
        return self._exchange(op, **arguments)["ok"]

    def _exchange(self, op: str, **arguments: Any) -> dict[str, Any]:
        self._sock.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
        try:
            line = self._replies.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise OSError(errno.ENODEV, f"vsockd in {self.folder} has ended")
        reply = json.loads(line)
        if "error" in reply:
            raise OSError(reply["errno"], reply["error"])
        return reply  # type: ignore[no-any-return]


class Events:
    """An iterator over events, each a dict, that ends when vsockd ends; also for ``async for``.

    Every event has ``topic``, ``time`` (seconds since the epoch) and ``missed``, the number of
    events before it that were dropped because they were not read in time.

    Topic ``context`` has ``cid``, ``name``, ``change`` (``added``, ``removed``, ``suspend``,
    ``ready``, ...), ``state``, ``ft`` and ``dropped`` (connections).  Topic ``denial`` has the
    fields listed in docs/security.md.  Topic ``disconnect``, a stream that an administrator has
    ended, has ``source``, ``destination``, and the administrator's ``pid``, ``uid`` and ``gid``.
    Topic ``vsockd`` has ``change``, which is ``replaced``, and the ``pid`` of the process that
    serves.
    """

    def __init__(self, folder: Path, topics: tuple[str, ...]) -> None:
        self._sock = _connect(folder)
        self._received = b""
        try:
            request = {"op": "subscribe", "topics": list(topics)}
            self._sock.sendall(json.dumps(request).encode() + b"\n")
            reply = self._next_line(VSOCKD_REPLY_TIMEOUT_SECONDS) or {}
            if "error" in reply:
                raise OSError(reply["errno"], reply["error"])
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription."""
        self._sock.close()

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the next event, and return it.

        Raises TimeoutError after ``timeout`` seconds, EOFError when vsockd ends.
        """
        line = self._next_line(timeout)
        if line is None:
            raise EOFError("vsockd has ended")
        return line["event"]  # type: ignore[no-any-return]

    def fileno(self) -> int:
        """Return the connection's descriptor, which polls as readable when events arrive."""
        return self._sock.fileno()

    def take(self) -> list[dict[str, Any]] | None:
        """Return the events received so far without waiting, or None if vsockd has ended."""
        self._sock.setblocking(False)  # with a timeout, Python waits despite MSG_DONTWAIT
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
        import asyncio  # imported here: it takes long, and few programs need it

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
            # At least 1 us: a timeout of 0 would make the socket non-blocking.
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
    """Return a connection to the administrator's socket in ``folder``.

    Raises OSError: ENODEV if vsockd does not run, EACCES if this user may not connect.
    """
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
        raise OSError(
            errno.ENODEV, f"vsockd is not running in {folder} (start it: {how_to_start(folder)})"
        ) from None
    except BaseException:
        sock.close()
        raise
    return sock
