"""vsockd as a whole: the fabric, its contexts' listeners, and the administrator's socket."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pickle
import resource
import signal
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from .. import logs
from .._linux.libc import check, libc
from .._linux.process import allow_many_descriptors
from ..eventloop.loop import EventLoop
from ..fabric import Fabric, Refused, Settings
from ..model.address import FIRST_GUEST_CID
from ..model.constants import VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR
from ..state_folder import (
    CONTROL,
    ISOLATED,
    LIVES,
    LOCK,
    LOG,
    PRIVATE,
    START,
    TRASH,
    require_private,
)
from .admin import reports
from .admin.audit import Audit, Events, Topic
from .admin.control import ControlHandlers, ControlSocket
from .broker import Broker
from .configuration import ConfigurationError, load
from .context_manager import ContextManager, Trash, remove_folder
from .crash_records import How, IsolatedGuests, Start
from .datagram_epochs import EarlierEpochs
from .handover import Reader, Saved, Writer
from .in_flight import InFlight
from .journal import Journal, Left
from .limits import DAEMON_SLOW_CALL_SECONDS
from .recovery import Killed, recover_pending
from .succession import (
    FORWARDED,
    Part,
    Predecessor,
    Successor,
    adopt_orphans,
    restore_broker,
    restore_early,
    save_broker,
    save_early,
    save_handle,
)

log = logging.getLogger(__name__)

# inotify(7)
_IN_MOVED_FROM, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x40, 0x200, 0x400, 0x800
_IN_UNMOUNT, _IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR = 0x2000, 0x4000, 0x8000, 0x0100_0000
_OF_A_NAME = _IN_MOVED_FROM | _IN_DELETE
_OF_THE_FOLDER = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_Q_OVERFLOW | _IN_IGNORED
_EVENT = struct.Struct("iIII")
_MOST = 65_536


class FolderWatch:
    """A watch that calls ``changed`` when ``folder``, or a name in it, was moved or removed.

    ``names`` are the names to watch.  Raises OSError when the folder cannot be watched.
    """

    def __init__(
        self, loop: EventLoop, folder: Path, names: Collection[str], changed: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._names = {os.fsencode(name) for name in names}
        self._changed = changed
        self._fd = check(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        mask = _OF_A_NAME | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR
        try:
            check(libc.inotify_add_watch(self._fd, os.fsencode(folder), mask))
        except OSError:
            os.close(self._fd)
            raise
        loop.watch(self._fd, self._ready)

    def close(self) -> None:
        """Stop watching."""
        self._loop.unwatch(self._fd)
        os.close(self._fd)

    def _ready(self, events: int) -> None:
        data = os.read(self._fd, _MOST)
        while data:
            _, mask, _, size = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
            data = data[_EVENT.size + size :]
            if mask & _OF_THE_FOLDER or name in self._names:
                self._changed()
                return


#: Files of the state folder that programs need to find vsockd.
_NEEDED = (CONTROL, LOCK, PRIVATE)


class AlreadyRunning(Exception):
    """Another vsockd runs in this state folder."""


class Vsockd:
    """The daemon: one fabric in one state folder, which becomes the current directory."""

    def __init__(
        self,
        folder: Path,
        start: Start,
        relay: Sequence[str],
        successor: Sequence[str],
        predecessor: Predecessor | Killed | None = None,
        in_flight: InFlight | None = None,
    ) -> None:
        """Prepare to serve in the state folder ``folder``, and lock it.

        ``relay`` is the command that starts the hybrid relay, ``successor`` the one of
        :class:`.succession.Successor`.  With a ``predecessor``, take over its state.  With
        ``in_flight``, the memory of a holder, keep a journal there.

        Raises AlreadyRunning, ConfigurationError, OtherwiseStarted, JournalDamaged, or OSError if
        the folder cannot be used.
        """
        self._configuration = start.configuration
        self._settings = settings = self._read_settings(predecessor)
        self.folder = folder.absolute()
        self._watch: FolderWatch | None = None
        self._is_lost = False
        self._command = successor
        self._in_flight = in_flight
        self._successor: Successor | None = None
        # To be called if the successor cannot take over.
        self._replacing: list[Callable[[str], None]] = []
        self._predecessor = predecessor
        self.is_replaced = False  #: whether a successor serves instead
        self.is_stopping = False  #: whether vsockd, or its successor, is to end
        self._lifeline: int | None = None
        self._journal: Journal | None = None
        _raise_descriptor_limit()
        self.loop = EventLoop()
        self.events = Events()
        self.fabric = Fabric(os.geteuid())
        self.fabric.settings = settings
        audit = Audit(self.events, settings.audit_rate)
        self.broker = Broker(self.loop, self.fabric, audit, in_flight)
        if predecessor is not None:
            self._reader = predecessor.reader = Reader(self.fabric, predecessor.descriptors)
        if isinstance(predecessor, Predecessor):
            predecessor.receive(self._restore_early)
        if predecessor is None:
            self._held = held = self._open_folder(start)
        else:
            self._held = held = self._take_folder(predecessor)
        private = held / PRIVATE
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        os.chdir(private)
        epoch = "" if predecessor is None else predecessor.state["datagrams"]["epoch"]
        self._earlier_epochs = EarlierEpochs(private / LIVES, epoch)
        self._trash = Trash(private / TRASH)
        if predecessor is None:
            _clean(held, self._trash)
        self._isolated = IsolatedGuests(private / ISOLATED)
        self.contexts = ContextManager(
            *(self.folder, held, self._trash, self.loop, self.fabric, self.broker),
            *(audit, self.events, self._isolated, relay),
        )
        handlers = ControlHandlers(
            broker=self.broker,
            contexts=self.contexts,
            events=self.events,
            status=self.status,
            reload=self.reload,
            stop=self.stop_for_good,
            replace=self.replace,
        )
        if predecessor is not None:
            self._control = self._restore(predecessor, handlers)
            return
        self._earlier_epochs.record(self.broker.datagrams.epoch)
        self.contexts.open()
        self.contexts.configure(settings)
        self._control = ControlSocket(self.loop, handlers, self.folder / CONTROL)

    def _read_settings(self, predecessor: Predecessor | Killed | None) -> Settings:
        """Return the settings of the configuration, or those of a vsockd that was killed."""
        if isinstance(predecessor, Killed):  # the configuration may have become invalid
            predecessor.receive()
            settings: Settings = pickle.loads(predecessor.state["settings"])
            return settings
        return load(self._configuration)

    def _open_folder(self, start: Start) -> Path:
        """Lock the state folder and record the start; return a path to the folder.

        The path, through a descriptor, stays valid when the folder is moved or replaced.
        """
        self._started = time.time()
        self._is_service = start.how is How.SERVICE
        self._lock = _lock(self.folder)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._place = os.open(self.folder, flags)
        held = Path(f"/proc/self/fd/{self._place}")
        start.require_admitted(held / START)
        start.write(held / START)
        return held

    def _take_folder(self, predecessor: Predecessor | Killed) -> Path:
        """Take over the state folder and its lock; return a path as :meth:`_open_folder`."""
        state, descriptors = predecessor.state, predecessor.descriptors
        self._started, self._is_service = state["started"], state["is_service"]
        self._lock, self._place = descriptors[state["lock"]], descriptors[state["place"]]
        if state["lifeline"] is not None:
            self._lifeline = descriptors[state["lifeline"]]
        return Path(f"/proc/self/fd/{self._place}")

    def _restore_early(self, part: Saved) -> None:
        """Restore a part of the state of the predecessor, which goes on serving."""
        restore_early(self._reader, part, self.broker)
        if part["is_last"] and self._in_flight is not None:
            self._journal = self._new_journal(self._in_flight)
            self._journal.prepare(lambda writer: save_early(writer, self.broker))

    def _restore(
        self, predecessor: Predecessor | Killed, handlers: ControlHandlers
    ) -> ControlSocket:
        """Restore what the predecessor has saved, without serving yet."""
        state, reader = predecessor.state, self._reader
        restore_broker(reader, state, self.loop, self.broker)
        # Guests of this vsockd, not of one that has crashed.
        self._isolated.before.difference_update(one.cid for one in self.fabric.contexts)
        self.contexts.restore(reader, state["listeners"])
        taken = reader, state["control"]
        return ControlSocket(self.loop, handlers, self.folder / CONTROL, taken)

    def _take_over(self, predecessor: Predecessor) -> None:
        """Let the predecessor stop, and begin to serve with the state restored from it."""
        predecessor.confirm()
        self._begin_journal()
        try:
            self.contexts.configure(self._settings, others=False)
        except (Refused, OSError) as error:
            log.error("cannot apply the configuration: %s", error)
        for context in self.fabric.contexts:
            if context.device is not None:
                context.device.streams.refresh()
        self.broker.streams.resume()
        pid = os.getpid()
        log.info("vsockd was replaced: process %d serves", pid)
        self.events.publish(Topic.VSOCKD, change="replaced", pid=pid)
        self._control.answer_replaced(pid)

    def _begin_journal(self, left: Left | None = None, serial: int = 0) -> None:
        if self._in_flight is None:
            return
        self._in_flight.memory.folder = self._place
        journal = self._journal or self._new_journal(self._in_flight)
        journal.begin(left, serial)
        self.broker.keep_journal(journal)

    def _new_journal(self, in_flight: InFlight) -> Journal:
        return Journal(in_flight, self.loop, self.fabric, self._save_for_journal, save_handle)

    def _save_for_journal(self, writer: Writer) -> Saved:
        return {**self._save_with(writer), "settings": pickle.dumps(self.fabric.settings)}

    def _recover(self, killed: Killed) -> None:
        """Begin to serve in the place of a vsockd that was killed."""
        self.broker.streams.reap()
        recover_pending(self.broker)
        self._begin_journal(killed.left, killed.serial)
        killed.continue_request(self.broker, self._control)
        for context in self.fabric.contexts:
            if context.device is not None:
                context.device.streams.refresh()
        self.broker.streams.resume()
        log.error("vsockd was killed or has crashed: process %d serves in its place", os.getpid())
        self.events.publish(Topic.VSOCKD, change="restarted", pid=os.getpid())
        self._control.resume()

    def run(
        self, announce_ready: Callable[[], None] = lambda: None, lifeline: int | None = None
    ) -> bool:
        """Serve until SIGTERM, SIGINT or a stop request, then remove vsockd's files.

        ``announce_ready`` is called once vsockd serves.  ``lifeline`` is a descriptor: vsockd also
        ends when its other end is closed.  Return False if vsockd ended because programs could not
        find it any longer.
        """
        if lifeline is not None:
            self._lifeline = lifeline
        if isinstance(self._predecessor, Killed):
            self._recover(self._predecessor)
        elif self._predecessor is not None:
            self._take_over(self._predecessor)
        else:
            self._begin_journal()
        self.broker.streams.open()
        if self._lifeline is not None:
            self.loop.watch(self._lifeline, lambda events: self.stop())
        try:
            with (
                self.loop.signalled(
                    {
                        signal.SIGTERM: self.stop,
                        signal.SIGINT: self.stop,
                        signal.SIGHUP: self._reload_by_signal,
                    }
                ),
                self.loop.interrupting_calls(DAEMON_SLOW_CALL_SECONDS),
            ):
                os.pwrite(self._lock, f"{os.getpid():<10}\n".encode(), 0)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
                self._earlier_epochs.end(
                    self.loop, self.broker.deferred, self.broker.datagrams.epoch
                )
                self._trash.begin()
                self._watch_folder()
                announce_ready()
                self.loop.run()
                # A further signal, of a service manager that signals all processes, must not end
                # the cleanup.
                signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        finally:
            if not self.is_replaced:
                self._clean_up()
        return not self._is_lost

    def _clean_up(self) -> None:
        if self._successor is not None:
            self._successor.cancel()
        if self._watch is not None:
            self._watch.close()
        self._control.close()
        (self._held / CONTROL).unlink(missing_ok=True)
        self.contexts.close()
        all_ended = self.broker.datagrams.close()
        os.chdir("/")
        if all_ended:  # else the next vsockd searches
            (self._held / PRIVATE / LIVES).unlink(missing_ok=True)
        if not self._is_service:
            (self._held / PRIVATE / ISOLATED).unlink(missing_ok=True)
            (self._held / START).unlink(missing_ok=True)
        self._trash.close()
        with contextlib.suppress(OSError):  # the trash folder is not empty
            (self._held / PRIVATE).rmdir()
        for log_file in (self._held / LOG, logs.older(self._held / LOG)):
            log_file.unlink(missing_ok=True)
        # The lock file is removed while locked: see _lock for the counterpart.
        (self._held / LOCK).unlink(missing_ok=True)
        os.close(self._lock)

    def leave(self, stay: bool) -> Path:
        """Close everything, after a successor has taken over; return a path to the state folder.

        With ``stay``, this process becomes the parent of all further successors.  The path is valid
        in this process only.
        """
        assert self._successor is not None
        if self._in_flight is not None:  # the holder closes everything
            if self.is_stopping or signal.sigpending() & set(FORWARDED):
                self._successor.stop()
            self._successor.release(self._in_flight)
            return self.folder
        place = os.dup(self._place)
        if stay:
            adopt_orphans()
        elif self.is_stopping or signal.sigpending() & set(FORWARDED):
            self._successor.stop()
        self._successor.release()
        os.closerange(3, place)
        os.closerange(place + 1, os.sysconf("SC_OPEN_MAX"))
        return Path(f"/proc/self/fd/{place}")

    def _watch_folder(self) -> None:
        try:
            self._watch = FolderWatch(self.loop, self._held, _NEEDED, self._end_if_lost)
        except OSError as error:  # for example, the user's limit of inotify instances (128)
            log.warning("cannot notice a removal of %s: %s", self.folder, error.strerror)
        self._end_if_lost()  # the folder may have been moved while no vsockd watched it

    def _end_if_lost(self) -> None:
        """Stop serving if the state folder was moved or lost a file: no program could connect."""
        with contextlib.suppress(OSError):
            for name in _NEEDED:
                os.lstat(self.folder / name)
            if os.path.samestat(os.lstat(self.folder / LOCK), os.fstat(self._lock)):
                return
        log.error("ending: %s was removed or replaced, programs cannot find vsockd", self.folder)
        self._is_lost = True
        self.stop()

    # Requests of administrators

    def stop(self) -> None:
        """Shut down, after the reply to the current request."""
        self.is_stopping = True
        self.loop.stop()

    def stop_for_good(self) -> None:
        """Shut down as :meth:`stop` does, so that no service manager starts this vsockd again."""
        self._is_service = False
        self.stop()

    def replace(self, failed: Callable[[str], None]) -> None:
        """Start a successor, which takes over when it is ready.

        ``failed`` is called with the reason if the successor does not take over.

        Raises OSError when the successor cannot be started.
        """
        if self._successor is None:
            steps = self._save, self._on_succession
            self._successor = Successor(self.loop, self._command, *steps)
        self._replacing.append(failed)

    def _save(self) -> Iterator[Part]:
        """Yield the parts of vsockd's state, for a successor."""
        writer = Writer(self.fabric)
        for part in save_early(writer, self.broker):
            yield Part(part, writer.take_descriptors(), False)
        writer.find_parties(self.fabric)
        state = self._save_with(writer) | {"is_held": self._in_flight is not None}
        yield Part(state, writer.take_descriptors(), True)

    def _save_with(self, writer: Writer) -> Saved:
        lifeline = None if self._lifeline is None else writer.descriptor(self._lifeline)
        return {
            "lock": writer.descriptor(self._lock),
            "place": writer.descriptor(self._place),
            "lifeline": lifeline,
            "started": self._started,
            "is_service": self._is_service,
            "listeners": self.contexts.save(writer),
            "control": self._control.save(writer),
            **save_broker(writer, self.broker),
        }

    def _on_succession(self, reason: str) -> None:
        if not reason:
            self.is_replaced = True
            signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # they are the successor's
            self.loop.stop_at_once()
            return
        log.error("vsockd cannot be replaced, and continues: %s", reason)
        self._successor = None
        replacing, self._replacing = self._replacing, []
        for failed in replacing:
            failed(f"vsockd was not replaced: {reason}")

    def reload(self) -> None:
        """Read the configuration again.

        Raises ConfigurationError when it is invalid; then the current settings remain in force.
        """
        self.contexts.configure(load(self._configuration))
        if self.broker.journal is not None:
            self.broker.journal.row("values", 1, pickle.dumps(self.fabric.settings))
            self.broker.journal.commit()

    def status(self) -> reports.Report:
        """Report vsockd's pid, folder, configuration, uptime in seconds, and counts."""
        totals = yield from reports.status(self.broker)
        status = {
            "pid": os.getpid(),
            "folder": str(self.folder),
            "configuration": str(self._configuration),
            "holder": None if self._in_flight is None else os.getppid(),
            "uptime": round(time.time() - self._started, 1),
            **totals([]),
        }
        return lambda _: status

    def _reload_by_signal(self) -> None:
        try:
            self.reload()
        except (ConfigurationError, Refused, OSError) as error:
            log.error("cannot reload, the configuration is unchanged: %s", error)
        else:
            log.warning("the configuration was reloaded")


def _lock(folder: Path) -> int:
    """Lock the state folder and return the lock's descriptor.

    The kernel releases the lock when the process ends for any reason.

    Raises AlreadyRunning when another vsockd has the lock.
    """
    require_private(folder, create=True)
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise AlreadyRunning(f"vsockd is already running in {folder} (pid {pid})") from None
        # The previous vsockd may have removed the file between open and flock here.
        if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
        os.close(lock)


def _clean(folder: Path, trash: Trash) -> None:
    """Remove the files of a vsockd that was killed, and no others."""
    (folder / CONTROL).unlink(missing_ok=True)
    logs.older(folder / LOG).unlink(missing_ok=True)
    for entry in (folder / PRIVATE).iterdir():
        if entry.name not in (ISOLATED, LIVES, TRASH):
            entry.unlink()
    for entry in folder.iterdir():
        cid = int(entry.name) if entry.name.isdecimal() else -1
        is_context = cid in (VMADDR_CID_HYPERVISOR, VMADDR_CID_HOST) or cid >= FIRST_GUEST_CID
        if is_context and entry.name == str(cid) and entry.is_dir() and not entry.is_symlink():
            remove_folder(entry, trash)


def _raise_descriptor_limit() -> None:
    """Raise the limit of descriptors as far as allowed: vsockd holds one per bound socket."""
    allow_many_descriptors()
    try:
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        pass  # only root may exceed the hard limit
