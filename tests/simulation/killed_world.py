"""The real broker with its journal, which is killed at any line of its code and starts again.

The step in which it is killed is a process of its own.  That process shares the descriptors of this
one, and the memory of the request under way, as vsockd shares them with its holder; its own memory
is lost, as that of a vsockd which is killed.
"""

from __future__ import annotations

import _socket
import contextlib
import gc
import mmap
import os
import select
import signal
import socket
import sys
from pathlib import Path
from random import Random
from types import FrameType, FunctionType, ModuleType
from typing import Any, ClassVar, cast

import vsockets.daemon
from vsockets._linux.cloning import clone_sharing_descriptors
from vsockets._linux.inspection import open_descriptors
from vsockets.daemon import journal as journal_module
from vsockets.daemon import recovery, succession
from vsockets.daemon.broker import Broker
from vsockets.daemon.channel import Channel
from vsockets.daemon.handover import Reader, Writer
from vsockets.daemon.in_flight import InFlight
from vsockets.daemon.journal import Journal
from vsockets.daemon.recovery import Killed
from vsockets.fabric import Credentials, EndpointKind, Fabric

from .broker_clients import Client, Process, ProgramChannel, SimulatedAudit
from .broker_world import OWNER, STREAM, TYPES, BrokerWorld
from .engine import World
from .simulated_sockets import SimulatedLoop, SimulatedSockets

_FOLDER = str(Path(vsockets.daemon.__file__).parent)
#: Objects of killed vsockds that would close a descriptor, which may be another's.
_kept: list[object] = []


class KilledBroker(Killed):
    """The state that a killed vsockd has left; its clients' rights are simulated."""

    def __init__(self, in_flight: InFlight, kept: set[int], clients: dict[int, Process]) -> None:
        """Start without state; ``clients`` are the processes that have connected, by inode."""
        super().__init__(in_flight, kept)
        self._clients = clients

    def _channel(self, broker: Broker, sock: socket.socket) -> Channel:
        process = self._clients[os.fstat(sock.fileno()).st_ino]
        kind = EndpointKind.SEQPACKET if self.in_flight.request.kind else STREAM
        context = broker.fabric.contexts.require(process.cid)
        plain = _socket.socket(socket.AF_UNIX, TYPES[kind], 0, sock.detach())
        credentials = Credentials(process.pid, process.uid, process.uid)
        return ProgramChannel(plain, context, kind, credentials)


class NoAdministrators:
    """A control socket without clients."""

    def owns(self, fd: int) -> bool:
        return False


class KilledWorld(BrokerWorld):
    """Programs and devices of a vsockd that is killed, and has all that it had."""

    actions: ClassVar[dict[str, int]] = {
        **{
            name: weight
            for name, weight in BrokerWorld.actions.items()
            if name not in ("exhaust", "replace")
        },
        "kill_vsockd": 8,
    }
    faults = BrokerWorld.faults - {"exhaust", "replace"}
    every = 20  # processes take a hundred times as long as other steps

    def __init__(self) -> None:
        self.in_flight = InFlight()
        #: the number of connections that the process which is killed has accepted
        self.accepted = mmap.mmap(-1, mmap.PAGESIZE)
        #: the processes that have connected to vsockd, by the inode of vsockd's end
        self.ends: dict[int, Process] = {}
        super().__init__()

    def patches(self) -> list[tuple[Any, str, Any]]:
        return [
            *super().patches(),
            (journal_module, "DAEMON_JOURNAL_LEAST_BYTES", 4096),
            (recovery, "control_sockets", self._clients_among),
            (recovery, "open_descriptors", self._open_descriptors),
        ]

    def _open_descriptors(self) -> set[int]:
        """Return the open descriptors; those that stay open need no look."""
        found = set(map(int, os.listdir("/proc/self/fd")))
        return {fd for fd in found if fd in self.others or os.path.lexists(f"/proc/self/fd/{fd}")}

    def _clients_among(self, descriptors: list[int]) -> list[socket.socket]:
        return [
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            for fd in descriptors
            if os.fstat(fd).st_ino in self.ends
        ]

    def _start(self) -> None:
        #: the descriptors that are neither vsockd's nor its clients'
        self.others = open_descriptors() - {self.loop._epoll.fileno()}
        super()._start()
        self.broker.in_flight = Channel.in_flight = self.in_flight
        self._begin_journal(Journal.begin)

    def _begin_journal(self, begin: Any, *arguments: Any) -> None:
        loop = cast(Any, self.loop)
        journal = Journal(self.in_flight, loop, self.fabric, self._save, succession.save_handle)
        begin(journal, *arguments)
        self.broker.keep_journal(journal)

    def _save(self, writer: Writer) -> dict[str, Any]:
        others: dict[str, Any] = {"control": {"sessions": []}, "listeners": [], "settings": b""}
        return others | succession.save_broker(writer, self.broker)

    def _stop(self) -> None:
        super()._stop()
        journal = self.broker.journal
        assert journal is not None and journal._log is not None
        journal._log.close()
        Channel.in_flight = None

    def _record(self) -> None:
        """Record what the world has changed by itself."""
        journal = self.broker.journal
        assert journal is not None
        for context in self.fabric.contexts:
            journal.context(context, True, None)
        journal.commit()

    def do_change(self, chance: Random) -> None:
        super().do_change(chance)
        self._record()

    def do_limit(self, chance: Random) -> None:
        super().do_limit(chance)
        self._record()

    def do_wrap(self, chance: Random) -> None:
        super().do_wrap(chance)
        self._record()

    def do_attach(self, chance: Random) -> None:
        super().do_attach(chance)
        self._record()

    def _new(self, chance: Random, *arguments: Any) -> Client | None:
        one = super()._new(chance, *arguments)
        if one is not None:
            process, _, theirs = self.arriving[-1]
            self.ends[os.fstat(theirs.fileno()).st_ino] = process
        return one

    def _accept_client(self) -> None:
        process, kind, theirs = self.arriving[0]

        def accept() -> tuple[int, object]:
            self.arriving.popleft()
            self.accepted[0] += 1
            return theirs.detach(), None

        fd, _ = self.in_flight.accepting(process.cid, int(kind is not STREAM), accept)()
        sock = _socket.socket(socket.AF_UNIX, TYPES[kind], 0, fd)
        context = self.fabric.contexts.require(process.cid)
        credentials = Credentials(process.pid, process.uid, process.uid)
        self.broker.serve_first(ProgramChannel(sock, context, kind, credentials))

    def do_kill_vsockd(self, chance: Random) -> None:
        """vsockd is killed at a line of its code, or between two events, and starts again."""
        lines = chance.choice([0, chance.randrange(60), chance.randrange(600)])
        self.accepted[0] = 0
        pid = clone_sharing_descriptors()
        if not pid:
            self._serve_until_killed(chance, lines)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        for _ in range(self.accepted[0]):
            self.arriving.popleft()[2].detach()
        forget(self.broker)
        forget(self.loop)
        self._recover()

    def _serve_until_killed(self, chance: Random, lines: int) -> None:
        left = lines

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if event == "call" and not frame.f_code.co_filename.startswith(_FOLDER):
                return None
            left -= event == "line"
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            if lines:
                sys.settrace(trace)
                for _ in range(3):
                    self.do_turn(chance)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)

    def _recover(self) -> None:
        """Start again, as :class:`.Vsockd` does."""
        kept = self.others | {one.sock.fileno() for one in self.clients}
        kept |= {theirs.fileno() for _, _, theirs in self.arriving}
        for device in self.devices:
            socks = [device.link, *device.streams, *(sock for _, sock in device.pending)]
            kept |= {sock.fileno() for sock in socks}
        killed = KilledBroker(self.in_flight, kept, self.ends)
        killed.receive()
        now, self.loop = self.loop.now, SimulatedLoop(SimulatedSockets())
        self.loop.now = now
        loop, self.fabric = cast(Any, self.loop), Fabric(OWNER)
        audit = cast(Any, SimulatedAudit())
        self.broker = Broker(loop, self.fabric, audit, self.in_flight)
        killed.reader = Reader(self.fabric, killed.descriptors)
        succession.restore_broker(killed.reader, killed.state, loop, self.broker)
        self.broker.streams.reap()
        recovery.recover_pending(self.broker)
        self._begin_journal(Journal.begin, killed.left, killed.serial)
        killed.continue_request(self.broker, cast(Any, NoAdministrators()))
        self.broker.streams.resume()
        self.broker.streams.open()


def forget(root: object) -> None:
    """Have the objects of a killed vsockd close nothing: it has left its descriptors open."""
    seen: set[int] = set()
    reached = [root]
    while reached:
        one = reached.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, World, InFlight)):
            continue
        seen.add(id(one))
        if isinstance(one, _socket.socket):
            one.detach()
        elif isinstance(one, (select.epoll, mmap.mmap)):
            _kept.append(one)
        elif isinstance(one, FunctionType):
            for cell in one.__closure__ or ():
                with contextlib.suppress(ValueError):  # it is empty
                    reached.append(cell.cell_contents)
        else:
            reached += gc.get_referents(one)
