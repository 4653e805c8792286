"""Contexts at run time: their creation, configuration and removal, control sockets and folders.

Normally vsockd removes the few names it has created in a context's folder.  A folder with anything
else in it, however large and deep, and even while its owner keeps adding files, is renamed into a
folder that only vsockd can enter, which is quick, and is removed there, in a thread
(:class:`Trash`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from .._linux.folders import describe, file_mode, shown_path, working_in
from .._linux.sockets import refuse_descriptors
from ..eventloop.loop import Acceptor, EventLoop
from ..fabric import (
    Change,
    Connection,
    Context,
    ContextSettings,
    Credentials,
    EndpointKind,
    Fabric,
    Isolation,
    Limits,
    Refused,
    Settings,
    State,
)
from ..fabric.policy import require_own_guest
from ..model.constants import VMADDR_CID_HOST
from ..state_folder import SEQPACKET, STREAM
from .admin.audit import Audit, Events, Topic
from .broker import Broker
from .crash_records import IsolatedGuests
from .handover import Reader, Saved, Writer
from .hybrid_listener import HybridListener
from .limits import CONTROL_BACKLOG_MAX

log = logging.getLogger(__name__)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_CONTROL_SOCKETS = (
    (EndpointKind.STREAM, STREAM, socket.SOCK_STREAM),
    (EndpointKind.SEQPACKET, SEQPACKET, socket.SOCK_SEQPACKET),
)


class Trash:
    """The trash folder at ``path``, created if missing, and the folders to be removed in it."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        self._path = path
        # Random, to differ from names of an earlier vsockd that may still be in the folder.
        self._prefix = secrets.token_hex(8)
        # Next(count()) is safe in two threads; next() of a generator is not.
        self._numbers = count()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = False

    def discard(self, path: Path) -> None:
        """Move ``path``, on the same file system, into the trash folder, to be removed there.

        Raises OSError when it cannot be renamed.
        """
        os.rename(path, self._new_path())
        if self._begun:
            self.begin()

    def _new_path(self) -> Path:
        return self._path / f"{self._prefix}.{next(self._numbers)}"

    def begin(self) -> None:
        """Start removing the contents, in a thread.

        Call it after forking, because a forked process does not have the thread.
        """
        self._begun = True
        if self._thread is None and os.listdir(self._path):
            self._thread = threading.Thread(target=self._run, name="trash", daemon=True)
            self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """Remove the trash folder; if it is not empty, the next vsockd removes its contents."""
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def _run(self) -> None:
        hopeless: set[str] = set()
        while self._wanted.wait():
            self._wanted.clear()
            while names := set(os.listdir(self._path)) - hopeless:
                for name in names:
                    try:
                        self._remove(self._path / name)
                    except OSError as error:
                        hopeless.add(name)
                        path = shown_path(self._path / name)
                        log.warning("cannot remove %s: %s", path, error.strerror)

    def _remove(self, path: Path) -> None:
        """Remove ``path``; subfolders are moved up into the trash folder, to limit the depth."""
        try:
            folder = os.open(path, _FOLDER)
        except NotADirectoryError:
            path.unlink()
            return
        try:
            # A process that still has the folder open cannot add files to it after this.
            os.fchown(folder, os.geteuid(), -1)
            os.fchmod(folder, 0o700)
            with os.scandir(folder) as entries:
                for entry in entries:
                    # Rmdir below then fails, and that is reported.
                    with contextlib.suppress(OSError):
                        if entry.is_dir(follow_symlinks=False):
                            name = self._new_path()
                            os.rename(entry.name, name, src_dir_fd=folder)
                        else:
                            os.unlink(entry.name, dir_fd=folder)
        finally:
            os.close(folder)
        path.rmdir()


class ContextListeners:
    """The folder of one context and the two control sockets in it.

    Permission to connect to the sockets makes a process a program of the context: for a guest,
    processes of the virtual machine's owner; for the hypervisor, those of the fabric's owner; for
    the host, every process that can enter the state folder.  The folder belongs to vsockd: no
    other user can add files to it, or replace a socket.
    """

    def __init__(
        self,
        loop: EventLoop,
        broker: Broker,
        context: Context,
        folder: Path,
        trash: Trash,
        taken: tuple[Reader, Saved] | None = None,
    ) -> None:
        """Create the folder and the sockets, unless they are ``taken`` from the previous vsockd.

        ``folder`` is a path through a descriptor, valid also after the state folder was moved or
        replaced.

        Raises OSError when the folder or a socket cannot be created.
        """
        self._folder = folder
        self._trash = trash
        self._acceptors: list[Acceptor] = []
        if taken is None:
            self._create(loop, broker, context)
            return
        reader, saved = taken
        for (kind, _, _), number in zip(_CONTROL_SOCKETS, saved["listeners"], strict=True):
            listener = socket.socket(fileno=reader.descriptors[number])
            listener.setblocking(False)
            self._accept(loop, broker, context, kind, listener)

    def save(self, writer: Writer) -> Saved:
        """Return the state of the sockets for the next vsockd."""
        return {"listeners": [writer.descriptor(one.listener.fileno()) for one in self._acceptors]}

    def _accept(
        self,
        loop: EventLoop,
        broker: Broker,
        context: Context,
        kind: EndpointKind,
        listener: socket.socket,
    ) -> None:
        admit = partial(broker.admit, context, kind)
        who = f"a program of context {context.cid}"
        acceptor = Acceptor(loop, listener, who, admit)
        if broker.in_flight is not None:
            number = 0 if kind is EndpointKind.STREAM else 1
            acceptor.accept = broker.in_flight.accepting(context.cid, number, acceptor.accept)
        self._acceptors.append(acceptor)

    def _create(self, loop: EventLoop, broker: Broker, context: Context) -> None:
        folder, trash = self._folder, self._trash
        is_host = context.cid == VMADDR_CID_HOST
        if folder.is_dir():  # an earlier context's folder, which could not be removed
            trash.discard(folder)
        folder.mkdir(mode=0o700)
        try:
            for kind, name, sock_type in _CONTROL_SOCKETS:
                listener = socket.socket(socket.AF_UNIX, sock_type | socket.SOCK_NONBLOCK)
                self._accept(loop, broker, context, kind, listener)
                # Clients see the bound name in getpeername(): the name alone discloses no path.
                with working_in(folder), file_mode(0o666 if is_host else 0o600):
                    listener.bind(name)
                # Connections inherit both options: the kernel attaches each writer's credentials,
                # and descriptors are refused except where datagram requests and records have them.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                if kind is EndpointKind.STREAM:
                    refuse_descriptors(listener)
                if context.is_guest and context.owner != os.geteuid():
                    os.chown(folder / name, context.owner, -1, follow_symlinks=False)
                listener.listen(CONTROL_BACKLOG_MAX)
            if is_host:
                folder.chmod(0o755)
            elif context.is_guest:
                folder.chmod(0o711)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the sockets and remove the folder."""
        for acceptor in self._acceptors:
            acceptor.close()
        remove_folder(self._folder, self._trash)


def remove_folder(folder: Path, trash: Trash) -> None:
    """Remove a context's folder and everything in it, at once or by way of ``trash``."""
    try:
        for _, name, _ in _CONTROL_SOCKETS:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        try:
            trash.discard(folder)
        except OSError as error:
            log.warning("cannot remove %s: %s", shown_path(folder), error.strerror)


class ContextManager:
    """All contexts of the fabric, each with its folder below ``folder``.

    ``held`` is a path to the same folder that stays valid when the folder is moved or replaced.
    """

    def __init__(
        self,
        folder: Path,
        held: Path,
        trash: Trash,
        loop: EventLoop,
        fabric: Fabric,
        broker: Broker,
        audit: Audit,
        events: Events,
        isolated: IsolatedGuests,
        relay: Sequence[str],
    ) -> None:
        self._folder = folder
        self._held = held
        self._trash = trash
        self._loop = loop
        self._fabric = fabric
        self._broker = broker
        self._audit = audit
        self._events = events
        self._isolated = isolated
        self._relay = relay
        fabric.contexts.reserved = isolated.before
        self._listeners: dict[Context, list[ContextListeners | HybridListener]] = {}

    def open(self) -> None:
        """Create the sockets of the hypervisor and the host.

        Raises OSError if one cannot be created.
        """
        self._open_listeners(self._fabric.contexts.hypervisor)
        self._open_listeners(self._fabric.contexts.host)

    def save(self, writer: Writer) -> list[Saved]:
        """Return the state of all contexts' sockets for the next vsockd."""
        saved = (self._save_listeners(context, writer) for context in self._listeners)
        return [one for one in saved if one is not None]

    def restore(self, reader: Reader, saved: list[Saved]) -> None:
        """Accept connections on the sockets that the previous vsockd has saved."""
        for one in saved:
            context = reader.context(one["cid"])
            common = self._loop, self._broker, context
            folder = self._held / str(context.cid)
            first, *hybrid = one["listeners"]
            listeners = self._listeners[context] = [
                ContextListeners(*common, folder, self._trash, (reader, first))
            ]
            for two in hybrid:
                path = Path(context.hybrid)
                listeners.append(HybridListener(*common, path, self._relay, (reader, two)))

    def close(self) -> None:
        """Close all listening sockets."""
        for context in list(self._listeners):
            self._close_listeners(context)

    def folder_of(self, context: Context) -> Path:
        """Return the folder of a context's control sockets, which exists unless powered off."""
        return self._folder / str(context.cid)

    # Adding and removing

    def add(
        self,
        wanted: ContextSettings,
        leased: bool = False,
        keep_on_error: bool = False,
        profile_given: bool = True,
    ) -> Context:
        """Add a guest, or one more lease on it: see :meth:`vsockets.fabric.Contexts.add`.

        With ``keep_on_error``, a guest whose sockets cannot be created is added powered off,
        and the error is logged: a guest's owner must not be able to keep vsockd from starting.
        Unless ``profile_given``, a guest that was isolated before a crash of vsockd is isolated
        again.

        Raises OSError when its sockets cannot be created.
        """
        contexts = self._fabric.contexts
        known = len(contexts)
        owner = os.geteuid() if wanted.owner is None else wanted.owner
        if wanted.reserved_ports:
            require_own_guest(owner, contexts.host.owner)
            present = None if wanted.cid is None else contexts.get(wanted.cid)
            if present is not None and not present.reserved_ports:
                raise Refused(errno.EEXIST, f"context {wanted.cid} exists, without reserved ports")
        context = contexts.add(wanted.cid, wanted.name, owner, leased)
        if len(contexts) == known:  # one more lease
            self._record(context)
            return context
        context.isolation = wanted.isolation
        if not profile_given:
            context.isolation = self._isolated.isolation(context.cid)
        else:
            self._isolated.before.discard(context.cid)
        context.set_limits(wanted.limits)
        context.hybrid = wanted.hybrid
        context.reserved_ports = wanted.reserved_ports
        context.parent = wanted.parent
        context.reported_cid = wanted.reported_cid
        try:
            self._isolated.record(contexts)
            if wanted.powered:
                self._open_listeners(context, keep_on_error)
            else:
                context.state = State.OFF
        except OSError as error:
            if not keep_on_error:
                contexts.remove(context.cid)
                raise
            log.error("context %d stays powered off: %s", context.cid, describe(error))
            context.state = State.OFF
        self._publish(context, "added")
        return context

    def remove(self, cid: int) -> None:
        """Remove a guest.

        Raises Refused with ENOENT, EINVAL or, while the guest has open streams, EBUSY.
        """
        context = self._fabric.contexts.require(cid)
        if context.is_guest:
            self._broker.streams.reap()
            streams = len(self._fabric.connections_of(context))
            if streams:
                raise Refused(
                    errno.EBUSY,
                    f"context {cid} has {streams} open streams: end them, or power it off first",
                )
        self._fabric.contexts.remove(cid)
        self._isolated.before.discard(cid)
        self._finish_removal(context)

    def end_lease(self, context: Context) -> None:
        """End one lease on ``context``; after the last one, power it off and remove it."""
        if self._fabric.contexts.get(context.cid) is not context:
            return
        if context.leases > 1:
            context.leases -= 1
            self._record(context)
            return
        # It has its last lease until it is removed: vsockd may be killed before.
        if context.state is not State.OFF:
            self.change(context, Change.POWER_OFF)
        self._fabric.departed.add(context.counts)
        self._fabric.contexts.remove(context.cid)
        self._finish_removal(context)

    def configure(self, settings: Settings, others: bool = True) -> None:
        """Add missing guests of ``settings``; set the isolation and limits of existing ones.

        With ``others``, set also the limits of contexts without a configuration.  No connection is
        dropped, and no guest removed.
        """
        self._fabric.settings = settings
        self._audit.set_rate(settings.audit_rate)
        configured = {wanted.cid for wanted in settings.contexts}
        for context in self._fabric.contexts if others else ():
            if context.cid not in configured:
                context.set_limits(settings.limits if context.is_guest else settings.host_limits)
                self._record(context)
        by_name = {context.name: context for context in self._fabric.contexts}
        for wanted in settings.contexts:
            found = (
                by_name.get(wanted.name)
                if wanted.cid is None
                else self._fabric.contexts.get(wanted.cid)
            )
            if found is None:
                self.add(wanted, keep_on_error=True)
            else:
                self.adjust(found, wanted.isolation, wanted.limits)

    def adjust(self, context: Context, isolation: Isolation, limits: Limits) -> None:
        """Set the isolation and limits of ``context`` for requests from now on."""
        context.isolation = isolation
        context.set_limits(limits)
        self._isolated.record(self._fabric.contexts)
        self._record(context)
        _refresh(context)

    # Life cycle

    def change(self, context: Context, change: Change) -> list[Connection]:
        """Apply ``change`` to a guest; return its streams that could not be disconnected yet.

        Raises Refused with EINVAL: see :mod:`vsockets.fabric.life_cycle`.
        """
        self._broker.streams.reap()
        over = self._fabric.change(context, change)
        left = self._broker.streams.disconnect(over) if over else []
        if change is Change.SUSPEND:
            self._broker.datagrams.revoke_routes(context)
        elif change is Change.POWER_OFF:
            self._close_listeners(context)
            self._broker.close_context(context)
        elif change is Change.POWER_ON:
            try:
                self._open_listeners(context, True)
            except OSError:
                context.state = State.OFF
                raise
        _refresh(context)
        self._publish(context, change.value, dropped=len(over))
        return [one for one in left if context in (one.context, one.peer_context)]

    def disconnect(
        self, one: tuple[int, int], other: tuple[int, int], asker: Credentials
    ) -> list[Connection]:
        """Disconnect the stream between two addresses, in either order, for ``asker``.

        Returns a list with the stream if it could not be disconnected yet, else an empty list.

        Raises Refused with ENOENT when there is no such stream.
        """
        self._broker.streams.reap()
        connection = self._fabric.find_connection(one, other)
        self._fabric.end(connection.number)
        left = self._broker.streams.disconnect([connection])
        self._audit.record_disconnect(connection, asker)
        return [connection] if connection in left else []

    def _open_listeners(self, context: Context, without_hybrid: bool = False) -> None:
        """Create a context's sockets; with ``without_hybrid``, a failing hybrid one is left out."""
        common = self._loop, self._broker, context
        folder = self._held / str(context.cid)
        listeners = self._listeners[context] = [ContextListeners(*common, folder, self._trash)]
        try:
            if context.hybrid:
                listeners.append(HybridListener(*common, Path(context.hybrid), self._relay))
        except OSError as error:
            if without_hybrid:
                log.warning("context %d has no hybrid socket: %s", context.cid, error.strerror)
                return
            self._close_listeners(context)
            raise

    def _close_listeners(self, context: Context) -> None:
        listeners = self._listeners.pop(context, ())
        if self._broker.journal is not None:  # before descriptors are closed
            self._broker.journal.row("listeners", context.cid, None)
            self._broker.journal.commit()
        for listener in listeners:
            listener.close()
        # vsockd may have been killed after it had recorded that they are closed.
        remove_folder(self._held / str(context.cid), self._trash)

    def _finish_removal(self, context: Context) -> None:
        for other in self._fabric.contexts:
            if other.parent == context.cid:  # the CID may be assigned to another guest
                other.parent = 0
        self._close_listeners(context)
        self._broker.close_context(context)
        self._publish(context, "removed")
        with contextlib.suppress(OSError):  # the old record makes no guest less isolated
            self._isolated.record(self._fabric.contexts)

    def announce_ready(self, cid: int) -> None:
        """Publish that a context's guest has reported that it has started.  Raises Refused."""
        self._publish(self._fabric.contexts.require(cid), "ready")

    def _record(self, context: Context) -> None:
        """Record a context and its control sockets in the journal."""
        journal = self._broker.journal
        if journal is not None:
            present = self._fabric.contexts.get(context.cid) is context
            journal.context(context, present, self._save_listeners(context, journal.writer))

    def _save_listeners(self, context: Context, writer: Writer) -> Saved | None:
        listeners = self._listeners.get(context)
        if listeners is None:
            return None
        return {"cid": context.cid, "listeners": [one.save(writer) for one in listeners]}

    def _publish(self, context: Context, change: str, **facts: Any) -> None:
        self._record(context)
        self._events.publish(
            Topic.CONTEXT,
            cid=context.cid,
            name=context.name,
            change=change,
            state=context.state.value,
            ft=context.fault_tolerant,
            **facts,
        )


def _refresh(context: Context) -> None:
    """Report a context's new rights to its device, if it has one."""
    if context.device is not None:
        context.device.streams.refresh()
