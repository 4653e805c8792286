"""Execution of programs: in place of this process, or for each connection."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import NoReturn

import click

from ..socket import socket
from .errors import CliError
from .output import notice

#: Exit statuses of shells and env(1) for a program that cannot be executed, or is missing.
NOT_EXECUTABLE, NOT_FOUND = 126, 127


def exec_program(program: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by ``program``, looked up on the PATH.

    Raises CliError, with the exit status that env(1) has, if the program cannot be executed.
    """
    if not program[0]:
        raise CliError("the program's name is empty", NOT_FOUND)
    # Python ignores these signals, and exec keeps that; programs expect the default.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(program[0], program, environment)
    except FileNotFoundError:
        raise _not_found(program[0]) from None
    except PermissionError as error:
        why = f"{program[0]}: {error.strerror} (expected an executable file: chmod +x)"
        raise CliError(why, NOT_EXECUTABLE) from None
    except OSError as error:
        raise CliError(f"{program[0]}: {error.strerror}", NOT_EXECUTABLE) from None


def _not_found(program: str) -> CliError:
    expected = "the path of an existing program" if "/" in program else "a path, or a name on PATH"
    return CliError(f"{program}: program not found (expected {expected})", NOT_FOUND)


def split_command(command: str | None) -> list[str]:
    """Return the words of the value of ``--exec``, split as a shell does; empty for None.

    Raises CliError if the program is missing.
    """
    if command is None:
        return []
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise click.UsageError(f"--exec {command}: {error}") from None
    if not arguments:
        raise click.UsageError("--exec: expected a command")
    if shutil.which(arguments[0]) is None:  # before a client connects
        raise _not_found(arguments[0])
    return arguments


def environment_for(sock: socket) -> dict[str, str]:
    """Return the environment of a command that serves ``sock``, with the peer's address."""
    cid, port = sock.getpeername()
    return {**os.environ, "VSOCK_PEER_CID": str(cid), "VSOCK_PEER_PORT": str(port)}


def exec_on_socket(command: list[str], sock: socket) -> NoReturn:
    """Replace this process by ``command``, with ``sock`` as standard input and output."""
    sock.setblocking(True)
    os.dup2(sock.fileno(), 0)
    os.dup2(sock.fileno(), 1)
    exec_program(command, environment_for(sock))


def serve(listener: socket, accept: Callable[[], socket], command: list[str]) -> NoReturn:
    """Run ``command`` for each connection, any number at a time; never return."""
    running: dict[
        int, subprocess.Popen[bytes]
    ] = {}  # by pidfd, which is readable when the process ends
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                with accept() as sock:
                    try:
                        process = subprocess.Popen(
                            command,
                            stdin=sock.fileno(),
                            stdout=sock.fileno(),
                            env=environment_for(sock),
                        )
                    except OSError as error:
                        notice(f"{command[0]}: {error.strerror}")
                        continue
                pidfd = os.pidfd_open(process.pid)
                running[pidfd] = process
                poll.register(pidfd, select.POLLIN)
            else:
                poll.unregister(fd)
                os.close(fd)
                running.pop(fd).wait()
