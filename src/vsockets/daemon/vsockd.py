"""vsockd, put together: the fabric, the doors of its contexts, the administrator's socket."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..address import FIRST_GUEST_CID
from ..fabric import Connection, Context, Endpoint, Fabric, Kind, Refused
from ..limits import SLOW_CALL
from ..state_folder import CONTROL, LOCK, LOG, PRIVATE, require_private
from .broker import Broker
from .control import ControlSocket
from .door import Doors
from .loop import Loop


class AlreadyRunning(Exception):
    """Another vsockd has this state folder."""


class Vsockd:
    """A running fabric.  It changes the process's current directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._started = time.time()
        self._lock = _lock(self.folder)
        _clean(self.folder)
        _raise_descriptor_limit()
        private = self.folder / PRIVATE
        private.mkdir(mode=0o700)
        os.chdir(private)
        self.loop = Loop()
        self._fabric = Fabric(os.geteuid())
        self._broker = Broker(self.loop, self._fabric)
        self._doors: dict[Context, Doors] = {}
        self._open_doors(self._fabric.contexts.host)
        self._control = ControlSocket(self.loop, self, self.folder / CONTROL)

    def run(self, announce_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM, SIGINT or a stop request, then remove every trace.

        ``announce_ready`` is called when all of that is so.
        """
        self._broker.begin()
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        try:
            with (
                self.loop.stopped_by(signal.SIGTERM, signal.SIGINT),
                self.loop.hurried(SLOW_CALL),
            ):
                announce_ready()
                self.loop.run()
        finally:
            self._control.close()
            for doors in self._doors.values():
                doors.close()
            os.chdir("/")
            shutil.rmtree(self.folder / PRIVATE, ignore_errors=True)
            (self.folder / LOG).unlink(missing_ok=True)
            # The lock's file goes while the lock is held: see _lock for the other half.
            (self.folder / LOCK).unlink(missing_ok=True)
            os.close(self._lock)

    # What administrators ask for

    def stop(self) -> None:
        """Shut down, after the answer to whoever asked."""
        self.loop.stop()

    def add_context(self, cid: int | None, name: str, owner: int, leased: bool) -> Context:
        """Start a guest: see :meth:`Contexts.add`."""
        context = self._fabric.contexts.add(cid, name, owner, leased)
        if context in self._doors:  # one more lease
            return context
        try:
            self._open_doors(context)
        except OSError:
            self._fabric.contexts.remove(context.cid)
            raise
        return context

    def remove_context(self, cid: int) -> None:
        """Stop a guest.  Refused with EBUSY while it has open streams."""
        context = self._fabric.contexts.get(cid)
        if context is not None and context.is_guest:
            self._broker.reap()
            streams = sum(
                context in (stream.context, stream.peer_context)
                for stream in self._fabric.connections.values()
            )
            if streams:
                raise Refused(16, f"context {cid} has {streams} open streams; end them first")
        self._end(self._fabric.contexts.remove(cid))

    def end_lease(self, context: Context) -> None:
        """Whoever leased ``context`` has gone; with the last one it goes."""
        context.leases -= 1
        if context.leases == 0 and self._fabric.contexts.get(context.cid) is context:
            self._end(self._fabric.contexts.remove(context.cid))

    def status(self) -> dict[str, Any]:
        """Facts about this daemon."""
        self._broker.reap()
        self._broker.datagrams.sweep()
        return {
            "pid": os.getpid(),
            "folder": str(self.folder),
            "uptime": round(time.time() - self._started, 1),
            "contexts": len(self._fabric.contexts) - 1,  # the hypervisor runs no programs
            "streams": len(self._fabric.connections),
            "listeners": sum(
                isinstance(holder, Endpoint) and holder.listening
                for context in self._fabric.contexts
                for holder in context.connected
            ),
            "datagram_sockets": len(self._broker.datagrams),
            "refusals": self._broker.refusals,
            "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        }

    def contexts(self) -> list[dict[str, Any]]:
        """Every context programs can be in, by CID."""
        known = sorted(self._doors, key=lambda context: context.cid)
        return [self.describe_context(context) for context in known]

    def describe_context(self, context: Context) -> dict[str, Any]:
        """One row of :meth:`contexts`."""
        return {
            "cid": context.cid,
            "name": context.name,
            "owner": context.owner,
            "leased": context.leased,
            "folder": str(self._doors[context].folder),
            "ports": len(context.connected) + len(context.datagrams),
        }

    def sockets(self) -> list[dict[str, Any]]:
        """Every socket: listening and bound ones, datagram sockets, both ends of streams."""
        self._broker.reap()
        self._broker.datagrams.sweep()
        rows: list[dict[str, Any]] = []
        for context in self._fabric.contexts:
            for holder in [*context.connected, *context.datagrams]:
                if isinstance(holder, Connection):
                    rows += _stream_rows(holder)
                else:
                    rows.append(_endpoint_row(holder))
        return sorted(rows, key=lambda row: (row["context"], row["type"], row["port"]))

    # Contexts

    def _open_doors(self, context: Context) -> None:
        folder = self.folder / str(context.cid)
        self._doors[context] = Doors(self.loop, self._broker, context, folder)

    def _end(self, context: Context) -> None:
        self._doors.pop(context).close()
        self._broker.close_context(context)


def _endpoint_row(endpoint: Endpoint) -> dict[str, Any]:
    state = "bound"
    if endpoint.kind is Kind.DATAGRAM:
        state = "unconnected"
    elif endpoint.listening:
        state = "listening"
    return {
        "context": endpoint.context.cid,
        "type": endpoint.kind.value,
        "state": state,
        "cid": endpoint.cid,
        "port": endpoint.port,
        "peer": None,
        "pid": endpoint.owner.pid,
        "uid": endpoint.owner.uid,
        "buffer": endpoint.sizes.size,
    }


def _stream_rows(stream: Connection) -> list[dict[str, Any]]:
    sides = (
        (stream.context, stream.local, stream.peer, stream.owner),
        (stream.peer_context, stream.peer, stream.local, stream.listener.owner),
    )
    return [
        {
            "context": context.cid,
            "type": stream.kind.value,
            "state": "established",
            "cid": local[0],
            "port": local[1],
            "peer": list(peer),
            "pid": owner.pid,
            "uid": owner.uid,
            "buffer": stream.size,
        }
        for context, local, peer, owner in sides
    ]


def _lock(folder: Path) -> int:
    """Have the state folder for ourselves, or raise AlreadyRunning.

    The kernel gives the lock back when the process ends, however it ends.
    """
    folder.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    require_private(folder)
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise AlreadyRunning(f"vsockd is already running in {folder} (pid {pid})") from None
        # The one before may have removed the file between our open and our lock.
        if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
        os.close(lock)


def _clean(folder: Path) -> None:
    """Remove what a vsockd that was killed left behind: nothing but what vsockd makes."""
    (folder / CONTROL).unlink(missing_ok=True)
    shutil.rmtree(folder / PRIVATE, ignore_errors=True)
    for entry in folder.iterdir():
        if entry.name.isdecimal() and (entry.name == "2" or int(entry.name) >= FIRST_GUEST_CID):
            shutil.rmtree(entry, ignore_errors=True)


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as this process may have: vsockd holds one per bound socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        pass  # only root may go beyond the hard limit
