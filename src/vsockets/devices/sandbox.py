"""Sandbox of a device process, entered before any guest can connect.

A guest may find a fault by which it executes code in its device's process.  In the sandbox such
code cannot use the credentials of another user, open files, execute programs, use the network, or
map new executable memory.  The process keeps its open descriptors, and can create unix sockets.  A
device of hybrid vsock may also connect, bind and remove unix sockets by path.

A sandboxed device cannot remove its own socket, as system calls on paths are refused.  A child
process, which does nothing else, waits for the device's end and removes the socket.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from socket import AF_UNIX

from .._linux import bpf
from .._linux.folders import SocketFile
from .._linux.libc import libc

_NOBODY = 65_534
_CAPABILITIES_VERSION = 0x2008_0522  # capset(2): version 3, whose sets are six 32-bit words
_REFUSE = bpf.refuse(errno.EPERM)

_PROT_EXEC = 4
_FIONBIO = 0x5421  # socket.setblocking() calls it


@dataclass(frozen=True)
class _Architecture:
    """System call numbers of an architecture (``asm/unistd.h``)."""

    architecture: int
    seccomp: int
    plain: tuple[int, ...]  #: allowed with any arguments
    paths: tuple[int, ...]  #: also allowed to a device that has unix sockets with paths
    mmap: int
    mprotect: int
    socket: int
    socketpair: int
    ioctl: int


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word.partition("=")[2]) for word in text.split())


_MACHINES = {
    "x86_64": _Architecture(
        0xC000_003E,
        317,
        _numbers(
            "read=0 write=1 close=3 fstat=5 poll=7 lseek=8 munmap=11 brk=12 rt_sigaction=13 "
            "rt_sigprocmask=14 rt_sigreturn=15 readv=19 writev=20 select=23 sched_yield=24 "
            "mremap=25 madvise=28 dup=32 setitimer=38 getpid=39 accept=43 sendto=44 recvfrom=45 "
            "sendmsg=46 recvmsg=47 shutdown=48 getsockname=51 getpeername=52 setsockopt=54 "
            "getsockopt=55 exit=60 fcntl=72 gettimeofday=96 sigaltstack=131 gettid=186 futex=202 "
            "restart_syscall=219 clock_gettime=228 clock_nanosleep=230 exit_group=231 "
            "epoll_wait=232 epoll_ctl=233 newfstatat=262 pselect6=270 ppoll=271 epoll_pwait=281 "
            "accept4=288 getrandom=318 rseq=334 epoll_pwait2=441"
        ),
        paths=_numbers(
            "connect=42 bind=49 listen=50 rename=82 unlink=87 unlinkat=263 splice=275 pipe2=293"
        ),
        mmap=9,
        mprotect=10,
        socket=41,
        socketpair=53,
        ioctl=16,
    ),
    "aarch64": _Architecture(
        0xC000_00B7,
        277,
        _numbers(
            "epoll_ctl=21 epoll_pwait=22 dup=23 fcntl=25 close=57 lseek=62 read=63 write=64 "
            "readv=65 writev=66 pselect6=72 ppoll=73 newfstatat=79 fstat=80 exit=93 "
            "exit_group=94 futex=98 setitimer=103 clock_gettime=113 clock_nanosleep=115 "
            "sched_yield=124 restart_syscall=128 sigaltstack=132 rt_sigaction=134 "
            "rt_sigprocmask=135 rt_sigreturn=139 gettimeofday=169 getpid=172 gettid=178 accept=202 "
            "getsockname=204 getpeername=205 sendto=206 recvfrom=207 setsockopt=208 "
            "getsockopt=209 shutdown=210 sendmsg=211 recvmsg=212 brk=214 munmap=215 mremap=216 "
            "madvise=233 accept4=242 getrandom=278 rseq=293 epoll_pwait2=441"
        ),
        paths=_numbers(
            "unlinkat=35 renameat=38 pipe2=59 splice=76 bind=200 listen=201 connect=203"
        ),
        mmap=222,
        mprotect=226,
        socket=198,
        socketpair=199,
        ioctl=29,
    ),
}


def enter_sandbox(user: int | None = None, paths: bool = False) -> None:
    """Drop, permanently, the privileges and system calls that the device does not need.

    A process of root changes to the user id ``user`` (default: 65534, if the kernel allows it).
    ``paths`` allows unix sockets with paths; ``user`` may then be 0: root without capabilities.

    Raises OSError when the kernel refuses the sandbox, or when the system call numbers of this
    architecture are unknown.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no sandbox for {platform.machine()}: use --no-sandbox")
    import traceback  # noqa: F401  # error reports need it, and no file can be opened later

    if os.geteuid() == 0:
        other = user if user is not None and (user or paths) else _NOBODY
        try:
            os.setgroups([])
            os.setresgid(other, other, other)
            os.setresuid(other, other, other)
        except OSError as error:
            # A container's root may have no capability, or be the only user of its namespace: it
            # remains itself.  Another user's rights are not replaced by root's.
            if user or error.errno not in (errno.EPERM, errno.EINVAL):
                raise
    _check(libc.capset(struct.pack("Ii", _CAPABILITIES_VERSION, 0), bytes(24)))
    _check(libc.prctl(bpf.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    filter = _assemble(machine, machine.plain + machine.paths if paths else machine.plain)
    instructions = ctypes.create_string_buffer(filter, len(filter))
    program = bpf.SOCK_FPROG.pack(
        len(filter) // bpf.INSTRUCTION_SIZE, ctypes.addressof(instructions)
    )
    _check(libc.syscall(machine.seccomp, bpf.SET_MODE_FILTER, 0, program))
    sys.stderr.flush()


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the sandbox: {os.strerror(code)} (or use --no-sandbox)")


def _assemble(machine: _Architecture, plain: tuple[int, ...]) -> bytes:
    def check_argument(
        number: int, argument: int, test: int, constant: int, refuse_if: bool
    ) -> bytes:
        """Assemble the rule of the system call ``number``, which depends on one argument."""
        jumps = (1, 0) if refuse_if else (0, 1)
        return (
            bpf.instruction(bpf.IF_EQUAL, number, 0, 4)
            + bpf.instruction(bpf.LOAD, bpf.ARGUMENTS + 8 * argument)
            + bpf.instruction(test, constant, *jumps)
            + bpf.instruction(bpf.RETURN, bpf.ALLOW)
            + bpf.instruction(bpf.RETURN, _REFUSE)
        )

    parts = [
        bpf.instruction(bpf.LOAD, bpf.ARCHITECTURE),
        bpf.instruction(bpf.IF_EQUAL, machine.architecture, 1, 0),
        bpf.instruction(bpf.RETURN, bpf.KILL_PROCESS),
        bpf.instruction(bpf.LOAD, bpf.NUMBER),
    ]
    for number in plain:
        parts += [
            bpf.instruction(bpf.IF_EQUAL, number, 0, 1),
            bpf.instruction(bpf.RETURN, bpf.ALLOW),
        ]
    parts += [
        check_argument(machine.mmap, 2, bpf.IF_ANY_BIT, _PROT_EXEC, True),
        check_argument(machine.mprotect, 2, bpf.IF_ANY_BIT, _PROT_EXEC, True),
        check_argument(machine.socket, 0, bpf.IF_EQUAL, AF_UNIX, False),
        check_argument(machine.socketpair, 0, bpf.IF_EQUAL, AF_UNIX, False),
        check_argument(machine.ioctl, 1, bpf.IF_EQUAL, _FIONBIO, False),
        bpf.instruction(bpf.RETURN, _REFUSE),
    ]
    return b"".join(parts)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SocketRemoval:
    """Child process that removes a socket's ``file`` when this process ends in any way.

    Create the object before :func:`enter_sandbox`, in a process with one thread.
    """

    def __init__(self, file: SocketFile) -> None:
        self._child, theirs = socket.socketpair()
        # A signal to both processes must not end the child before the child ignores signals.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if os.fork() == 0:
                try:
                    _remove_afterwards(file, theirs.detach())
                finally:
                    os._exit(0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def finish(self) -> None:
        """Remove the socket's file now; return after its removal."""
        self._child.shutdown(socket.SHUT_WR)
        self._child.recv(1)
        self._child.close()


def _remove_afterwards(file: SocketFile, end: int) -> None:
    # A service manager and a terminal signal every process of the device; the child ends last.
    os.setsid()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    kept = sorted((end, file.folder))
    for first, last in zip([-1, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(first + 1, last)
    os.read(end, 1)
    file.remove()
