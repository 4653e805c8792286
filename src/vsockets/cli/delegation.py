"""``vsock run`` within ``vsock fabric``, whose command has a supervisor already.

A process has one supervisor for life, and so have its children.  Therefore ``vsock run`` passes its
arguments, environment, descriptors and working directory to the process that keeps the fabric,
which is not supervised.  That process starts the program with a supervisor of its own, and ``vsock
run`` relays signals and the exit status, as if the program were its child.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from .._linux.libc import end_with_parent
from ..supervisor.launch import CONTINUED, ENDED, MESSAGE, SIGNAL, STOPPED, follow_program
from . import fill_standard_files
from .errors import CliError, one_line
from .output import complain

#: The environment variable with the path of the socket for requests.
LAUNCHER = "VSOCKETS_LAUNCHER"


#: Seconds for a ``vsock run`` to send its request after it has connected.
_REQUEST_SECONDS = 10.0

#: Descriptors sent besides the program's own: that of its working directory, and that of a file
#: with its arguments and environment.
_OWN = 2
#: Descriptors of a program; the kernel passes up to 253 in a message (SCM_MAX_FD).
_DESCRIPTORS_MAX = 250
_CREDENTIALS = struct.Struct("=iII")
#: Signals that Python ignores: the program gets their default.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


# In vsock run


def delegate(**arguments: Any) -> NoReturn:
    """Run a program by the launcher that the environment names, and end as the program does.

    ``arguments`` are those of :func:`.run.run_here`.

    Raises CliError if the launcher does not answer or cannot start the program.
    """
    path = os.environ[LAUNCHER]
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.connect(path)
        if os.stat(path).st_uid != os.geteuid():
            raise CliError(f"{path}: it belongs to another user, and so would the program")
        _send_request(channel, arguments)
        # Wait for the acknowledgement: the program may now get the terminal's signals itself.
        answer = channel.recv(MESSAGE.size)
    except OSError as error:
        raise CliError(
            f"{LAUNCHER}: vsock fabric does not answer at {path}: {error.strerror}"
        ) from None
    if not answer:
        raise CliError(f"{LAUNCHER}: vsock fabric has closed the connection to {path}")
    _, group = MESSAGE.unpack(answer)
    follow_program(channel, group)


def _send_request(channel: socket.socket, arguments: dict[str, Any]) -> None:
    descriptors = list(_inherited())
    if len(descriptors) > _DESCRIPTORS_MAX:
        raise CliError(
            f"{len(descriptors)} descriptors to pass on (expected at most {_DESCRIPTORS_MAX})"
        )
    mask = os.umask(0)
    os.umask(mask)
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "umask": mask,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "ignored": [
            number
            for number in signal.valid_signals()
            if number not in _IGNORED_BY_PYTHON and signal.getsignal(number) == signal.SIG_IGN
        ],
        "group": os.getpgrp(),
        "pid": os.getpid(),
    }
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
    with os.fdopen(os.memfd_create("vsock-run"), "w+b") as file:
        file.write(json.dumps(request).encode())
        file.flush()
        socket.send_fds(channel, [b"r"], [folder, file.fileno(), *descriptors])
    os.close(folder)


def _inherited() -> Iterator[int]:
    """Yield the descriptors that a program started by this process would inherit."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if not fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                yield int(name)


# In vsock fabric


class Delegated:
    """A program that the launcher started for its client, a process of ``vsock run``."""

    def __init__(self, channel: socket.socket, pid: int, client: int) -> None:
        """Take ownership of ``channel``; ``client`` is the client's process ID."""
        self.channel = channel
        self.pid = pid
        self._client = client

    def on_message(self) -> bool:
        """Handle a message of the client; return False when the client has ended."""
        try:
            message = self.channel.recv(MESSAGE.size)
        except ConnectionResetError:
            message = b""
        # The process is not reaped before its channel is closed, so no other process has its id.
        if len(message) != MESSAGE.size:
            os.kill(self.pid, signal.SIGKILL)
            return False
        kind, number = MESSAGE.unpack(message)
        with contextlib.suppress(OSError):  # an invalid number
            os.kill(self.pid, number if kind == SIGNAL else signal.SIGCONT)
        return True

    def on_status(self, status: int) -> None:
        """Report the program's wait status to the client."""
        with contextlib.suppress(OSError):
            if os.WIFCONTINUED(status):
                os.kill(self._client, signal.SIGCONT)
            elif os.WIFSTOPPED(status):
                self.channel.send(MESSAGE.pack(STOPPED, 0))
            else:
                self.channel.send(MESSAGE.pack(ENDED, status))


class Launcher:
    """The socket at which a ``vsock run`` asks for a program to be started."""

    def __init__(self, path: Path, run: Callable[[dict[str, Any]], int], lifeline: int) -> None:
        """Listen at ``path``.

        ``run`` is called in a new process with the arguments of a ``vsock run``, and returns the
        exit status if it returns.  Programs end with the other end of ``lifeline``, a descriptor
        (see :func:`..supervisor.launch.launch`).
        """
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(os.fspath(path))
        self.listener.listen(128)
        self.listener.setblocking(False)
        self._run = run
        self._lifeline = lifeline

    def accept(self) -> Delegated | None:
        """Start a program for the next ``vsock run``; return None if that is not possible."""
        try:
            channel, _ = self.listener.accept()
        except OSError:
            return None
        received: list[int] = []
        channel.settimeout(_REQUEST_SECONDS)
        try:
            pid, client = self._start(channel, received)
            channel.setblocking(True)
            channel.send(MESSAGE.pack(CONTINUED, os.getpgrp()))
        except (OSError, ValueError, TypeError, LookupError, RecursionError):  # malformed requests
            channel.close()
            return None
        finally:
            for fd in received:
                os.close(fd)
        return Delegated(channel, pid, client)

    def _start(self, channel: socket.socket, received: list[int]) -> tuple[int, int]:
        size = _CREDENTIALS.size
        peer = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        if _CREDENTIALS.unpack(peer)[1] != os.geteuid():
            raise PermissionError
        _, descriptors, _, _ = socket.recv_fds(channel, 1, _DESCRIPTORS_MAX + _OWN)
        received += descriptors
        if len(received) < _OWN:
            raise ValueError
        folder, file, *passed = received
        with open(file, "rb", closefd=False) as reader:
            reader.seek(0)
            request = json.loads(reader.read())
        client = int(request["pid"])
        started, starting = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                lifeline = self._become(request, folder, passed, starting)
                status = self._run({**request["arguments"], "lifeline": lifeline})
            except Exception as error:
                complain(f"cannot run a program: {one_line(error)}")
            finally:
                os._exit(status)
        os.close(starting)
        os.read(started, 1)  # the program's process is in its group, or has ended
        os.close(started)
        return pid, client

    def _become(self, request: dict[str, Any], folder: int, passed: list[int], done: int) -> int:
        """Take over the process group, descriptors, directory and limits of ``vsock run``.

        Returns the descriptor of the lifeline.
        """
        end_with_parent()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            ignored = number in request["ignored"] or number in _IGNORED_BY_PYTHON
            with contextlib.suppress(OSError):
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            os.setpgid(0, request["group"])  # the terminal's signals reach the program there
        except OSError:  # another session
            os.setpgid(0, 0)
        os.close(done)
        os.fchdir(folder)
        os.umask(request["umask"])
        numbers = request["descriptors"]
        lifeline: int = max([*numbers, *passed, self._lifeline, 2]) + 1
        above = lifeline + 1
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in (*passed, self._lifeline)]
        first = 0
        for number, fd in sorted(zip([*numbers, lifeline], moved, strict=True)):
            if first < number:  # closerange(0, 0) closes all
                os.closerange(first, number)
            os.dup2(fd, number, inheritable=number != lifeline)
            first = number + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        fill_standard_files()
        resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files"]))
        os.environ.clear()
        os.environ.update(request["environment"])
        return lifeline
