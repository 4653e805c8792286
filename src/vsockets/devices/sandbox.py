"""A device's process, shut in before any guest can speak to it.

A guest that found a way to have its device run something should find nothing to do with it:
no other user's rights, no file to open, no program to run, no network, no new executable memory.
What is left is what was open before, and unix sockets between what is open.  A device of hybrid
vsock needs more: to connect and bind unix sockets by their paths, and to remove those.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from dataclasses import dataclass
from socket import AF_UNIX

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_NOBODY = 65_534
_CAPABILITIES_VERSION = 0x2008_0522  # capset(2): version 3, whose sets are six 32-bit words

# Instructions of classic BPF, and where struct seccomp_data has what.
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_ALLOW, _KILL = 0x7FFF_0000, 0x8000_0000
_REFUSE = 0x0005_0000 | errno.EPERM

_PROT_EXEC = 4
_FIONBIO = 0x5421  # what setblocking() is made of


@dataclass(frozen=True)
class _Architecture:
    """System call numbers, by ``asm/unistd.h``."""

    architecture: int
    seccomp: int
    plain: tuple[int, ...]  #: allowed whatever their arguments
    paths: tuple[int, ...]  #: and these to a device that has unix sockets with paths
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
    """Give up what the device does not need, for good.

    Root becomes ``user``, by default nobody.  With ``paths`` it may use unix sockets by their
    paths; then ``user`` may be root, without any capability.  OSError when the kernel will not
    have it, or on a machine whose system calls are not known here.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no sandbox for {platform.machine()}: use --no-sandbox")
    import traceback  # noqa: F401  # what an error's report needs cannot be loaded later

    if os.geteuid() == 0:
        other = user if user is not None and (user or paths) else _NOBODY
        os.setgroups([])
        os.setresgid(other, other, other)
        os.setresuid(other, other, other)
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.capset(struct.pack("Ii", _CAPABILITIES_VERSION, 0), bytes(24)))
    _call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    filter = _filter(machine, machine.plain + machine.paths if paths else machine.plain)
    instructions = ctypes.create_string_buffer(filter, len(filter))
    program = struct.pack("@HP", len(filter) // 8, ctypes.addressof(instructions))
    _call(libc.syscall(machine.seccomp, _SECCOMP_SET_MODE_FILTER, 0, program))
    sys.stderr.flush()


def _call(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"the sandbox: {os.strerror(code)} (or use --no-sandbox)")


def _filter(machine: _Architecture, plain: tuple[int, ...]) -> bytes:
    def instruction(code: int, constant: int, if_so: int = 0, if_not: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_so, if_not, constant)

    def unless(number: int, argument: int, test: int, constant: int, refuse_if: bool) -> bytes:
        """For the call ``number``, look at one of its arguments, and decide."""
        yes, no = (1, 0) if refuse_if else (0, 1)
        return (
            instruction(_IF_EQUAL, number, 0, 4)
            + instruction(_LOAD, _ARGUMENTS + 8 * argument)
            + instruction(test, constant, yes, no)
            + instruction(_RETURN, _ALLOW)
            + instruction(_RETURN, _REFUSE)
        )

    parts = [
        instruction(_LOAD, _ARCHITECTURE),
        instruction(_IF_EQUAL, machine.architecture, 1, 0),
        instruction(_RETURN, _KILL),
        instruction(_LOAD, _NUMBER),
    ]
    for number in plain:
        parts.append(instruction(_IF_EQUAL, number, 0, 1) + instruction(_RETURN, _ALLOW))
    parts += [
        unless(machine.mmap, 2, _IF_ANY_BIT, _PROT_EXEC, True),
        unless(machine.mprotect, 2, _IF_ANY_BIT, _PROT_EXEC, True),
        unless(machine.socket, 0, _IF_EQUAL, AF_UNIX, False),
        unless(machine.socketpair, 0, _IF_EQUAL, AF_UNIX, False),
        unless(machine.ioctl, 1, _IF_EQUAL, _FIONBIO, False),
        instruction(_RETURN, _REFUSE),
    ]
    return b"".join(parts)
