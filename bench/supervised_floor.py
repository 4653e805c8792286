"""The floor of interception by seccomp notification: one call, received and answered.

A process makes one system call again and again, and another answers it with the two ioctls that
this takes, and knows nothing.  ``perf bench sched seccomp-notify`` measures the same in C.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import socket
import struct

from vsockets._linux.bpf import NOTIFY
from vsockets.supervisor.arch import this_architecture
from vsockets.supervisor.filter import Rule, assemble
from vsockets.supervisor.notification import install

_SEND, _RECEIVE, _SET_FLAGS = 0xC018_2101, 0xC050_2100, 0x4008_2104
_NOTIFICATION, _RESPONSE = struct.Struct("=Q72x"), struct.Struct("=QqiI")


def cost(count: int) -> float:
    """Return the processor time of the answering process for a call, in microseconds."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _call(theirs, count)
    theirs.close()
    _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    try:
        before = resource.getrusage(resource.RUSAGE_SELF)
        _serve(listener)
        after = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        os.close(listener)
        os.waitpid(pid, 0)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent / count * 1e6


def _call(channel: socket.socket, count: int) -> None:
    """Make intercepted calls in this process, and end it."""
    try:
        machine = this_architecture()
        listener = install(machine, assemble(machine, [Rule(machine.listen, NOTIFY)]))
        socket.send_fds(channel, [b"l"], [listener])
        os.close(listener)
        with socket.socket() as sock:
            for _ in range(count):
                sock.listen()
    finally:
        os._exit(0)


def _serve(listener: int) -> None:
    """Answer all calls with 0."""
    with contextlib.suppress(OSError):  # before Linux 6.6
        fcntl.ioctl(listener, _SET_FLAGS, 1)  # SYNC_WAKE_UP, as vsock run
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    buffer, empty = bytearray(_NOTIFICATION.size), bytes(_NOTIFICATION.size)
    while poll.poll()[0][1] & select.POLLIN:
        buffer[:] = empty
        fcntl.ioctl(listener, _RECEIVE, buffer)
        fcntl.ioctl(listener, _SEND, _RESPONSE.pack(_NOTIFICATION.unpack(buffer)[0], 0, 0, 0))
