"""The vSockets device of a played machine with hybrid vsock, and the connections through it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket as stdlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from ..attachment import Attachment
from ..control import Control
from ..devices.client import ConnectRequest, DeviceClient
from ..devices.loop import DeviceLoop
from ..model.constants import VMADDR_CID_ANY, VMADDR_CID_HOST
from ..protocol.hybrid import Connect, ok_line, port_name
from ..socket import socket
from ..state_folder import LONGEST_SOCKET_PATH
from .faults import Faults, Strike
from .limits import (
    PLAYED_ACCEPT_PAUSE_SECONDS,
    PLAYED_BACKLOG_MAX,
    PLAYED_BACKLOG_PAUSE_SECONDS,
    PLAYED_BUFFER_BYTES,
    PLAYED_CONNECT_SECONDS,
    PLAYED_PORTS_MAX,
)
from .personalities import FIRST_HOST_PORT, Effect, Personality

Socket = stdlib.socket


class Connection:
    """A connection through a machine's device, with an end in the guest and one on the host."""

    def __init__(self, device: Device, guest: Socket, host: Socket, strike: Strike) -> None:
        self._device = device
        self._guest: Socket | None = guest
        self._host: Socket | None = host
        self._strike = strike
        self._guest_bytes = 0
        self._tasks: list[asyncio.Task[None]] = []
        device.connections.add(self)

    def start(self) -> None:
        """Start both directions."""
        guest, host = self._guest, self._host
        assert guest is not None
        assert host is not None
        if self._strike.name == "half-open":
            self._close_guest()
            self._spawn(self._end_at_first_byte_of_host(host))
            return
        self._spawn(self._pump(host, guest, False))
        self._spawn(self._pump(guest, host, True))

    def end(self) -> None:
        """Close both ends."""
        self._close_guest()
        self._close_host()

    def cut_guest(self, effect: Effect) -> None:
        """Close the host's end; close the guest's end, or keep it open until its first byte."""
        self._stop()
        self._close_host()
        guest = self._guest
        if effect is Effect.SILENT and guest is not None:
            self._spawn(self._end_at_first_byte_of_guest(guest))
        else:
            self._close_guest()

    def reset_guest(self, effect: Effect) -> None:
        """Reset the guest's end; the host's end stays open until the host's first byte."""
        self._stop()
        guest, host = self._guest, self._host
        if guest is not None:
            if effect is Effect.SILENT:
                self._spawn(self._end_at_first_byte_of_guest(guest))
            else:
                self._close_guest()
        if host is not None:
            self._spawn(self._end_at_first_byte_of_host(host))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _stop(self) -> None:
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._tasks = [task for task in self._tasks if task is current]

    def _close_guest(self) -> None:
        if self._guest is not None:
            _close(self._guest)
            self._guest = None
            self._forget()

    def _close_host(self) -> None:
        if self._host is not None:
            _close(self._host)
            self._host = None
            self._forget()

    def _forget(self) -> None:
        if self._guest is None and self._host is None:
            self._stop()
            self._device.connections.discard(self)

    async def _pump(self, source: Socket, sink: Socket, from_guest: bool) -> None:
        loop = asyncio.get_running_loop()
        machine = self._device
        try:
            while True:
                data = await loop.sock_recv(source, PLAYED_BUFFER_BYTES)
                await machine.running.wait()  # a paused guest's data stay in the device
                if not from_guest:
                    await machine.hears.wait()
                if not data:
                    await self._on_end(source, sink, from_guest)
                    return
                await self._move(data, sink, from_guest)
        except OSError:
            self.end()

    async def _move(self, data: bytes, sink: Socket, from_guest: bool) -> None:
        loop, strike = asyncio.get_running_loop(), self._strike
        if strike.name == "slow":
            for byte in data:
                await loop.sock_sendall(sink, bytes((byte,)))
                await asyncio.sleep(strike.seconds)
            return
        if from_guest:
            if strike.name in ("ok-without-data", "lost-writes"):
                return
            if strike.name in ("early-eof", "stall"):
                data = data[: strike.after - self._guest_bytes]
                self._guest_bytes += len(data)
        await loop.sock_sendall(sink, data)
        if strike.after and self._guest_bytes >= strike.after:
            if strike.name == "early-eof":
                raise OSError(errno.ECONNRESET, "early end of stream")
            if strike.name == "stall":
                await self._device.never.wait()

    async def _on_end(self, source: Socket, sink: Socket, from_guest: bool) -> None:
        half_close = self._device.personality.half_close
        if not from_guest and not half_close:
            self.end()
            return
        if half_close:
            with contextlib.suppress(OSError):
                sink.shutdown(stdlib.SHUT_WR)
        await self._device.hung_up(source)
        self.end()

    async def _end_at_first_byte_of_guest(self, guest: Socket) -> None:
        """Reset the guest's end as soon as it has sent a byte, which stays unread: ECONNRESET."""
        await _readable(guest)
        self._close_guest()

    async def _end_at_first_byte_of_host(self, host: Socket) -> None:
        """Close the host's end as soon as it has sent a byte or has closed."""
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(host, PLAYED_BUFFER_BYTES)
        self._close_host()


class Device:
    """The hybrid vsock device of one machine."""

    def __init__(
        self,
        *,
        personality: Personality,
        control: Control,
        cid: int,
        path: Path,
        faults: Faults,
        holders: dict[int, int],
    ) -> None:
        """Play the device of the guest ``cid`` with its unix socket at ``path``.

        ``holders`` has the CID of the machine that each port of a host's end was bound for last.
        """
        self.personality = personality
        self.connections: set[Connection] = set()
        self.running = asyncio.Event()
        self.running.set()
        self.hears = asyncio.Event()  #: set while the host's bytes reach the guest
        self.hears.set()
        self.never = asyncio.Event()  #: never set: what waits for it has stalled
        self.port = FIRST_HOST_PORT - 1  #: the last port of a host end
        self.cid = cid
        self.path = path
        self._faults = faults
        self._holders = holders
        self._host = Attachment(control.folder / str(VMADDR_CID_HOST))
        self._listener: Socket | None = None
        self._made = False  # the unix socket's file is the machine's own
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = DeviceLoop()
        asyncio.get_running_loop().add_reader(self._loop.fileno(), self._loop.turn)
        self._fabric = DeviceClient(
            self._loop, control.attach_played_host(cid), VMADDR_CID_HOST, datagrams=False
        )
        self._fabric.on_connect = self._on_guest_connect

    def open(self) -> None:
        """Create the unix socket and accept connections.

        Raises OSError if that is not possible, ValueError if the path is too long.
        """
        size = len(os.fsencode(self.path))
        if size > LONGEST_SOCKET_PATH:
            raise ValueError(
                f"{self.path}: a path of {size} bytes is too long for a unix socket (expected at "
                f"most {LONGEST_SOCKET_PATH})"
            )
        listener = stdlib.socket(stdlib.AF_UNIX)
        try:
            listener.bind(os.fspath(self.path))
            listener.listen(PLAYED_BACKLOG_MAX)
        except OSError as error:
            listener.close()
            hint = ""
            if error.errno == errno.EADDRINUSE:
                hint = " (remove the file of a machine that has ended, or choose another path)"
            raise OSError(error.errno, f"{self.path}: {error.strerror}{hint}") from None
        listener.setblocking(False)
        self._listener, self._made = listener, True
        self._spawn(self._accept(listener))

    @property
    def is_open(self) -> bool:
        """Flag: true while the VMM's process exists."""
        return self._listener is not None

    def stop(self) -> None:
        """End the tasks of the VMM's process; the caller ends the connections."""
        for task in list(self._tasks):
            task.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def remove_file(self) -> None:
        """Remove the unix socket's file, which outlives the VMM's process."""
        if self._made:
            self.path.unlink(missing_ok=True)
            self._made = False

    def close(self) -> None:
        """End the device, and remove its unix socket."""
        self.stop()
        self.remove_file()
        for connection in list(self.connections):
            connection.end()
        self._fabric.close()
        asyncio.get_running_loop().remove_reader(self._loop.fileno())
        self._loop.close()

    async def hung_up(self, sock: Socket) -> None:
        """Wait until the other end of ``sock`` has closed, or shut down, both directions."""
        done = asyncio.get_running_loop().create_future()
        # A descriptor of its own: when ``sock`` is closed meanwhile, its number may be used again.
        fd = os.dup(sock.fileno())

        def report(events: int) -> None:
            self._loop.unwatch(fd)
            if not done.done():
                done.set_result(None)

        self._loop.watch_for(fd, report, 0)
        try:
            await done
        finally:
            self._loop.unwatch(fd)
            os.close(fd)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Connections from the host

    async def _accept(self, listener: Socket) -> None:
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:
                await asyncio.sleep(PLAYED_ACCEPT_PAUSE_SECONDS)
                continue
            if len(self.connections) >= self.personality.connections:
                sock.close()
            else:
                self._spawn(self._serve(sock))

    async def _serve(self, sock: Socket) -> None:
        kept = False
        try:
            port = await self._read_line(sock)
            if port is not None:
                kept = await self._connect(sock, port)
        except OSError:
            pass
        finally:
            if not kept:
                _close(sock)

    async def _read_line(self, sock: Socket) -> int | None:
        """Return the port of the CONNECT line, or None if the VMM does not accept the line."""
        line, loop = Connect(), asyncio.get_running_loop()
        await _readable(sock)
        while line.port is None:
            try:
                size = line.take(sock.recv(1, stdlib.MSG_PEEK))
            except BlockingIOError:
                if not self.personality.joins_lines:
                    return None
                await _readable(sock)
                continue
            await loop.sock_recv(sock, size)
        return line.port

    async def _connect(self, sock: Socket, port: int) -> bool:
        """Connect ``sock`` to the guest's ``port``; return whether a connection owns it now."""
        loop = asyncio.get_running_loop()
        strike = self._faults.next(port, f"CONNECT {port} of machine {self.cid}")
        await self.running.wait()
        await self.hears.wait()
        if strike.name == "no-ok":
            await self.hung_up(sock)
            return False
        if strike.name == "late-ok":
            await asyncio.sleep(strike.seconds)
        if strike.name == "garbage":
            await loop.sock_sendall(sock, strike.garbage + b"\n")
            return False
        if strike.name != "reused-port" or self.port < FIRST_HOST_PORT:
            self._next_port()
        if strike.name == "stale-ok":
            await loop.sock_sendall(sock, ok_line(self.port))
            return False
        guest = socket(context=self._host)
        try:
            guest.setblocking(False)
            number = self._bind(guest)
            async with asyncio.timeout(PLAYED_CONNECT_SECONDS):
                await loop.sock_connect(guest, (self.cid, port))
            await loop.sock_sendall(sock, ok_line(number))
        except (OSError, asyncio.CancelledError):
            guest.close()
            raise
        Connection(self, guest, sock, strike).start()
        return True

    def _next_port(self) -> None:
        self.port = self.port + 1 if self.port + 1 < 1 << 31 else FIRST_HOST_PORT

    def _bind(self, guest: socket) -> int:
        """Bind the host's end of a connection: the guest sees the port that the OK line has.

        A real device counts its ports alone; a port that a connection of another machine has is
        skipped.  Raises OSError(EADDRINUSE) if one of this machine has it.
        """
        while True:
            try:
                guest.bind((VMADDR_CID_ANY, self.port))
            except OSError as error:
                holder = self._holders.get(self.port, self.cid)
                if error.errno != errno.EADDRINUSE or holder == self.cid:
                    raise
                self._next_port()
                continue
            self._holders.pop(self.port, None)
            self._holders[self.port] = self.cid
            if len(self._holders) > PLAYED_PORTS_MAX:
                del self._holders[next(iter(self._holders))]
            return self.port

    # Connections from the guest

    def _on_guest_connect(self, request: ConnectRequest) -> None:
        if not self.is_open or len(self.connections) >= self.personality.connections:
            self._refuse(request)
        else:
            task = self._spawn(self._connect_to_host(request))
            # A task that is cancelled before it has begun does not run at all.
            task.add_done_callback(lambda done: self._refuse(request) if done.cancelled() else None)

    def _refuse(self, request: ConnectRequest) -> None:
        self._fabric.settle(request, error=errno.ECONNRESET)
        request.sock.close()

    async def _connect_to_host(self, request: ConnectRequest) -> None:
        # All waits are before the reply: a cancelled task has not replied.
        await self.running.wait()
        await self.hears.wait()
        strike = self._faults.next(
            request.port, f"connect of machine {self.cid} to port {request.port}"
        )
        try:
            async with asyncio.timeout(PLAYED_CONNECT_SECONDS):
                sock = await _connect_unix(port_name(os.fspath(self.path), request.port))
        except OSError:
            self._refuse(request)
            return
        self._fabric.settle(request, request.sizes.size)
        Connection(self, request.sock, sock, strike).start()


async def _connect_unix(path: str) -> Socket:
    """Return a socket that is connected to ``path``, once its listener's backlog has room.

    Raises OSError if the path has no listener.
    """
    sock = stdlib.socket(stdlib.AF_UNIX)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:  # no event reports room in a backlog
                await asyncio.sleep(PLAYED_BACKLOG_PAUSE_SECONDS)
                continue
            return sock
    except BaseException:
        sock.close()
        raise


def _close(sock: Socket) -> None:
    loop = asyncio.get_running_loop()
    loop.remove_reader(sock.fileno())
    loop.remove_writer(sock.fileno())
    sock.close()


async def _readable(sock: Socket) -> None:
    """Wait until ``sock`` has a byte or its end of stream; the byte stays.

    If the wait is cancelled, the caller closes ``sock`` by :func:`_close`.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    fd = sock.fileno()

    def report() -> None:
        loop.remove_reader(fd)
        if not done.done():
            done.set_result(None)

    loop.add_reader(fd, report)
    await done
