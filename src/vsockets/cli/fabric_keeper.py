"""The process that has the fabric of a ``vsock fabric``, and the programs started in it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .._linux.libc import check, libc
from .._linux.process import allow_many_descriptors
from ..model.text import printable
from ..supervisor.launch import ENDED, FAILURE, MESSAGE, kill_all_children
from ..testing import FabricFailed, PrivateFabric
from . import played
from .delegation import LAUNCHER, Delegated, Launcher
from .errors import CliError, one_line
from .output import complain

_PR_SET_CHILD_SUBREAPER = 36

#: Seconds for supervisors to end with the fabric; it takes some hundredths of one.
_SUPERVISORS_SECONDS = 5.0

#: Signals that interrupt nothing here: the keeper ends after the command, as its supervisor does.
_HANDLED = (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
#: Signals of a terminal whose foreground this process never is.
_IGNORED = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP, signal.SIGQUIT)


class Keeper:
    """A private fabric that ends with a command."""

    def __init__(
        self,
        front: socket.socket,
        guests: dict[int, Path | None],
        reserved_ports: bool,
        machine: tuple[str, str | None] | None,
    ) -> None:
        """Take ownership of ``front``, the connection to the command's process.

        ``machine`` is the hypervisor to play, and the path of its unix socket.
        """
        self._front = front
        self._guests = guests
        self._machine = machine
        self._reserved_ports = reserved_ports
        self._fabric = PrivateFabric()
        self._launcher: Launcher | None = None
        # Supervisors have the other end: they end when this end is closed, and it reports end of
        # file after the last of them.
        self._supervisors, self._lifeline = socket.socketpair()
        self._programs: dict[int, Delegated] = {}  # by process ID
        self._status: int | None = None
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Start the fabric, report it, and return when the command has ended and all is removed.

        Raises OSError and FabricFailed, before the command has started.  A later error is printed,
        and ends the command.
        """
        check(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        allow_many_descriptors()
        wakeups = _wake_on_signals()
        status, failure, serves = 0, "", False
        try:
            with self._fabric:
                self._prepare(wakeups)
                serves = True
                try:
                    status = self._serve()
                finally:
                    self._end_programs()
        except Exception as error:
            if not serves:
                raise
            is_known = isinstance(error, FabricFailed)
            failure = str(error).partition(":\n")[0] if is_known else one_line(error)
            status = status or FAILURE
        with contextlib.suppress(OSError):  # standard error is closed
            if status:
                self._print_log(status, failure)
        with contextlib.suppress(OSError):
            self._front.send(MESSAGE.pack(ENDED, status))

    def _end_programs(self) -> None:
        """End the programs that were started for a ``vsock run``, then their supervisors.

        If a supervisor were killed first, its programs would go on without AF_VSOCK.
        """
        self._fabric.end_played()
        self._lifeline.close()
        self._supervisors.shutdown(socket.SHUT_WR)
        select.select([self._supervisors], [], [], _SUPERVISORS_SECONDS)
        kill_all_children(self._fabric.pid)

    def _prepare(self, wakeups: socket.socket) -> None:
        fabric = self._fabric
        for cid, path in self._guests.items():
            fabric.guest(cid, hybrid=path, reserved_ports=self._reserved_ports)
        environment = {"VSOCKETS_DIR": os.fspath(fabric.folder), "VSOCKETS_TRANSPORT": "fabric"}
        if self._machine is not None:
            environment |= self._play(*self._machine)
        self._selector.register(self._front, selectors.EVENT_READ, self._on_front)
        self._selector.register(wakeups, selectors.EVENT_READ, self._on_signals)
        socket_path = fabric.folder.parent / "launcher"
        environment[LAUNCHER] = os.fspath(socket_path)
        self._launcher = Launcher(socket_path, _run, self._lifeline.fileno())
        self._selector.register(self._launcher.listener, selectors.EVENT_READ, self._on_request)
        report = {
            "environment": environment,
            "folder": os.fspath(fabric.folder.parent),
            "keeper": os.getpid(),
            "vsockd": fabric.pid,
        }
        self._front.send(json.dumps(report).encode())

    def _play(self, hypervisor: str, path: str | None) -> dict[str, str]:
        """Add the played machine; return its environment variables."""
        machine = self._fabric.played(hypervisor, socket=path)
        return {
            played.API: self._fabric.played_api,
            played.CID: str(machine.cid),
            played.SOCKET: machine.socket,
            played.AGENT: machine.agent,
        }

    def _serve(self) -> int:
        """Serve until the command has ended, and return its wait status."""
        while self._status is None:
            for key, _ in self._selector.select():
                key.data(key.fileobj)
        return self._status

    def _on_front(self, front: socket.socket) -> None:
        try:
            message = front.recv(MESSAGE.size)
        except ConnectionResetError:
            message = b""
        # Without a message the command's process was killed: no client reads its log.
        self._status = MESSAGE.unpack(message)[1] if message else 0

    def _on_signals(self, wakeups: socket.socket) -> None:
        wakeups.recv(4096)
        self._reap()

    def _on_request(self, listener: socket.socket) -> None:
        assert self._launcher is not None
        program = self._launcher.accept()
        if program is not None:
            self._programs[program.pid] = program
            self._selector.register(
                program.channel, selectors.EVENT_READ, partial(self._on_message, program)
            )

    def _on_message(self, program: Delegated, channel: socket.socket) -> None:
        # The channel may have been closed since it was reported as readable.
        if channel.fileno() >= 0 and not program.on_message():
            self._selector.unregister(channel)
            channel.close()

    def _reap(self) -> None:
        for pid, program in list(self._programs.items()):
            while (status := _changed(pid)) is not None:
                program.on_status(status)
                if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                    del self._programs[pid]
                    if program.channel.fileno() >= 0:
                        self._selector.unregister(program.channel)
                        program.channel.close()
                    break
        # Orphans of programs.
        while (left := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if left.si_pid == self._fabric.pid or left.si_pid in self._programs:
                break
            os.waitpid(left.si_pid, 0)

    def _print_log(self, status: int, failure: str) -> None:
        """Print vsockd's log below a title, unless it is empty; print a ``failure`` always."""
        code = os.waitstatus_to_exitcode(status)
        lines = self._fabric.log.splitlines()
        how = f"signal {-code}" if code < 0 else f"status {code}"
        if lines:
            complain(f"fabric: {failure or f'the command ended with {how}'}; vsockd's log:")
        elif failure:
            complain(f"fabric: {failure}")
        for line in lines:
            print(printable(line), file=sys.stderr)
        sys.stderr.flush()


def _run(arguments: dict[str, Any]) -> int:
    """Run a program in this process as ``vsock run`` does; return the exit status of a failure."""
    from .run import run_here

    try:
        run_here(**arguments)
    except Exception as error:
        complain(one_line(error))
        return error.status if isinstance(error, CliError) else 1


def _changed(pid: int) -> int | None:
    """Return the wait status of a child that has ended, stopped or continued."""
    found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
    return status if found else None


def _wake_on_signals() -> socket.socket:
    """Return a socket that receives the number of each handled signal."""
    wakeups, wakeup = socket.socketpair()
    for sock in (wakeups, wakeup):
        sock.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach())
    for number in _HANDLED:
        signal.signal(number, lambda number, frame: None)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    return wakeups
