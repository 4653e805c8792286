"""Descriptors passed between the supervisor and a stopped thread, by SCM_RIGHTS.

Containers forbid ``pidfd_getfd(2)``, the simpler way to take a descriptor, and no system call gives
one to another process.  The calls needed here are allowed: by injected calls the thread makes a
unix datagram socket, over which it sends its descriptor to the supervisor, or receives one, and
closes the socket again.

While the socket is open, for some ten microseconds, other threads of the process could see it.  The
socket has the lowest free number, and the descriptor that the thread is given takes its place, so
POSIX's rule of the lowest number holds.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import errno
import os
import secrets
import struct
from collections.abc import Iterator
from socket import (
    AF_UNIX,
    CMSG_LEN,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_CREDENTIALS,
    SCM_RIGHTS,
    SO_PASSCRED,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOL_SOCKET,
)

from .arch import Architecture
from .injection import Injector, StoppedThread
from .process import Processes

#: struct msghdr, and struct iovec, of 64-bit Linux.
_MESSAGE, _VECTOR = struct.Struct("=QI4xQQQQi4x"), struct.Struct("=QQ")
#: struct cmsghdr with one descriptor.
_CONTROL = struct.Struct("=Qiii")
_ONE_DESCRIPTOR, _CONTROL_SPACE = CMSG_LEN(4), CMSG_SPACE(4)
_CREDENTIALS = struct.Struct("=iII")
_FAMILY = struct.Struct("=H")

#: Where these are in the page that injected calls use, in bytes.
_VECTOR_AT, _BYTE_AT, _NAME_AT, _CONTROL_AT = 64, 96, 128, 256

_INTERNAL = int(SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
_NO_WAIT = int(MSG_DONTWAIT | MSG_NOSIGNAL)
#: How often a message is sent to the supervisor if strangers have filled its queue.
_TRIES = 100
#: What is received: credentials, and up to the kernel's limit of descriptors.
_INBOX_CONTROL = CMSG_SPACE(_CREDENTIALS.size) + CMSG_SPACE(253 * 4)
_TAKE = int(MSG_DONTWAIT | MSG_CMSG_CLOEXEC)


class TraceeDescriptors:
    """Takes descriptors from stopped threads, and gives them descriptors."""

    def __init__(self, machine: Architecture, injector: Injector, processes: Processes) -> None:
        self._machine = machine
        self._injector = injector
        self._processes = processes
        self._may_get = _may_get(processes)
        # By an abstract name, because that needs no file system in common.  Messages of other
        # processes that find the name are ignored.
        self._inbox = _socket.socket(AF_UNIX, _INTERNAL)
        self._inbox.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
        name = b"\0vsockets-" + secrets.token_hex(8).encode()
        self._inbox.bind(name)
        self._name = _FAMILY.pack(AF_UNIX) + name

    def close(self) -> None:
        """Close the socket on which the supervisor receives descriptors."""
        self._inbox.close()

    def take(self, thread: StoppedThread, fd: int) -> int:
        """Return a copy of a stopped thread's descriptor.

        Raises OSError(EBADF) if it is not open.
        """
        if self._may_get:
            try:
                return self._processes.duplicate(thread.number, fd)
            except PermissionError:  # the process has become another user's
                pass
        channel = self._open_channel(thread)
        try:
            return self._send(thread, channel, fd)
        finally:
            self._injector.call(thread, self._machine.close, channel)

    def give(self, thread: StoppedThread, fd: int, close_on_exec: bool) -> int:
        """Give a stopped thread a copy of ``fd``; return the copy's number there.

        Raises OSError(EMFILE) if the thread has no free descriptor.
        """
        machine, call = self._machine, self._injector.call
        channel = self._open_channel(thread)
        try:
            self._fill(thread, channel, fd)
            received = self._receive(thread, channel)
        except OSError:
            call(thread, machine.close, channel)
            raise
        # In the place of the channel, which is thereby closed.
        number = call(thread, machine.dup3, received, channel, os.O_CLOEXEC * close_on_exec)
        call(thread, machine.close, received)
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        return number

    def _open_channel(self, thread: StoppedThread) -> int:
        return self._injector.checked(thread, self._machine.socket, AF_UNIX, _INTERNAL, 0)

    def _fill(self, thread: StoppedThread, channel: int, fd: int) -> None:
        """Queue a message with a copy of ``fd`` on the thread's socket ``channel``."""
        if self._may_get:
            copy = self._processes.duplicate(thread.number, channel)
        else:
            copy = self._send(thread, channel, channel)
        with contextlib.closing(_socket.socket(AF_UNIX, SOCK_DGRAM, 0, copy)) as sock:
            sock.bind("")  # the kernel chooses a name, to which the socket itself sends
            rights = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [fd]))]
            sock.sendmsg([b"d"], rights, _NO_WAIT, sock.getsockname())

    def _send(self, thread: StoppedThread, channel: int, fd: int) -> int:
        """Have a thread send a descriptor from the channel to the supervisor; return the copy."""
        name = self._name
        control = _CONTROL.pack(_ONE_DESCRIPTOR, SOL_SOCKET, SCM_RIGHTS, fd)
        at = self._write_message(thread, name, control, len(control))
        process = self._processes.first_thread(thread.number)
        for _ in range(_TRIES):
            self._empty_inbox()
            result = self._injector.call(thread, self._machine.sendmsg, channel, at, _NO_WAIT)
            if result != -errno.EAGAIN:
                break
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        for sender, descriptors in self._messages():
            if sender == process and len(descriptors) == 1:
                return descriptors[0]
            _close(descriptors)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _receive(self, thread: StoppedThread, channel: int) -> int:
        """Have a thread receive a descriptor on the channel; return the descriptor's number there.

        Raises OSError(EMFILE) if the thread received none.
        """
        at = self._write_message(thread, b"", bytes(_CONTROL.size), _CONTROL_SPACE)
        flags = int(MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
        self._injector.checked(thread, self._machine.recvmsg, channel, at, flags)
        control = self._processes.read(thread.number, at + _CONTROL_AT, _CONTROL.size)
        size, _, kind, number = _CONTROL.unpack(control)
        if size != _ONE_DESCRIPTOR or kind != SCM_RIGHTS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return int(number)

    def _write_message(
        self, thread: StoppedThread, name: bytes, control: bytes, control_size: int
    ) -> int:
        """Write a struct msghdr, and all that it points to, to a thread's memory.

        Returns its address.
        """
        at = self._injector.scratch(thread)
        while True:
            data = bytearray(_CONTROL_AT + _CONTROL.size)
            name_at = at + _NAME_AT if name else 0
            message = (name_at, len(name), at + _VECTOR_AT, 1, at + _CONTROL_AT, control_size, 0)
            _MESSAGE.pack_into(data, 0, *message)
            _VECTOR.pack_into(data, _VECTOR_AT, at + _BYTE_AT, 1)
            data[_NAME_AT : _NAME_AT + len(name)] = name
            data[_CONTROL_AT:] = control
            written_at = self._injector.write_scratch(thread, bytes(data))
            if written_at == at:
                return at
            at = written_at  # the program had unmapped the page, and this is another one

    def _empty_inbox(self) -> None:
        for _, descriptors in self._messages():
            _close(descriptors)

    def _messages(self) -> Iterator[tuple[int, list[int]]]:
        """Receive messages that threads have sent; yield the sender's id and the descriptors."""
        while True:
            try:
                _, control, _, _ = self._inbox.recvmsg(1, _INBOX_CONTROL, _TAKE)
            except BlockingIOError:
                return
            sender, descriptors = 0, array.array("i")
            for level, kind, data in control:
                if (level, kind) == (SOL_SOCKET, SCM_CREDENTIALS):
                    sender = _CREDENTIALS.unpack(data)[0]
                elif (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                    descriptors.frombytes(data[: len(data) // 4 * 4])
            yield sender, list(descriptors)


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _may_get(processes: Processes) -> bool:
    """Return whether ``pidfd_getfd(2)`` works, which containers forbid."""
    try:
        os.close(processes.duplicate(os.getpid(), 0))
    except OSError as error:
        return error.errno == errno.EBADF
    return True
