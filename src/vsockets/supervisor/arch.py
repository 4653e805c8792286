"""System call numbers of each supported processor architecture.

Sources: ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``include/uapi/asm-generic/unistd.h``
of Linux, ``linux/audit.h``.
"""

from __future__ import annotations

import platform
from typing import NamedTuple

#: The first system call of x32, a second numbering on x86-64.
FIRST_X32_CALL = 0x4000_0000


class Architecture(NamedTuple):
    """System call numbers of one architecture; -1 for a call that it lacks."""

    architecture: int  #: AUDIT_ARCH_*
    close: int
    dup: int
    dup2: int
    dup3: int
    fcntl: int
    mmap: int
    munmap: int
    ppoll: int
    prctl: int
    ptrace: int
    rt_sigaction: int
    tgkill: int
    write: int
    writev: int
    open: int
    openat: int
    stat: int
    lstat: int
    newfstatat: int
    statx: int
    access: int
    faccessat: int
    ioctl: int
    socket: int
    socketpair: int
    bind: int
    listen: int
    accept: int
    accept4: int
    connect: int
    getsockname: int
    getpeername: int
    setsockopt: int
    getsockopt: int
    shutdown: int
    sendto: int
    recvfrom: int
    sendmsg: int
    recvmsg: int
    sendmmsg: int
    recvmmsg: int
    seccomp: int
    process_vm_readv: int
    process_vm_writev: int
    #: The same on every architecture.
    io_uring_setup: int = 425
    io_uring_enter: int = 426
    io_uring_register: int = 427
    pidfd_open: int = 434
    faccessat2: int = 439


ARCHITECTURES = {
    "x86_64": Architecture(
        architecture=0xC000_003E,
        close=3,
        dup=32,
        dup2=33,
        dup3=292,
        fcntl=72,
        mmap=9,
        munmap=11,
        ppoll=271,
        prctl=157,
        ptrace=101,
        rt_sigaction=13,
        tgkill=234,
        write=1,
        writev=20,
        open=2,
        openat=257,
        stat=4,
        lstat=6,
        newfstatat=262,
        statx=332,
        access=21,
        faccessat=269,
        ioctl=16,
        socket=41,
        socketpair=53,
        bind=49,
        listen=50,
        accept=43,
        accept4=288,
        connect=42,
        getsockname=51,
        getpeername=52,
        setsockopt=54,
        getsockopt=55,
        shutdown=48,
        sendto=44,
        recvfrom=45,
        sendmsg=46,
        recvmsg=47,
        sendmmsg=307,
        recvmmsg=299,
        seccomp=317,
        process_vm_readv=310,
        process_vm_writev=311,
    ),
    "aarch64": Architecture(
        architecture=0xC000_00B7,
        close=57,
        dup=23,
        dup2=-1,
        dup3=24,
        fcntl=25,
        mmap=222,
        munmap=215,
        ppoll=73,
        prctl=167,
        ptrace=117,
        rt_sigaction=134,
        tgkill=131,
        write=64,
        writev=66,
        open=-1,
        openat=56,
        stat=-1,
        lstat=-1,
        newfstatat=79,
        statx=291,
        access=-1,
        faccessat=48,
        ioctl=29,
        socket=198,
        socketpair=199,
        bind=200,
        listen=201,
        accept=202,
        accept4=242,
        connect=203,
        getsockname=204,
        getpeername=205,
        setsockopt=208,
        getsockopt=209,
        shutdown=210,
        sendto=206,
        recvfrom=207,
        sendmsg=211,
        recvmsg=212,
        sendmmsg=269,
        recvmmsg=243,
        seccomp=277,
        process_vm_readv=270,
        process_vm_writev=271,
    ),
}


def this_architecture() -> Architecture:
    """Return the numbers of this machine's processor.

    Raises NotImplementedError if the processor is not supported.
    """
    name = platform.machine()
    if name not in ARCHITECTURES:
        raise NotImplementedError(
            f"unsupported processor: {name} (expected one of {', '.join(ARCHITECTURES)})"
        )
    return ARCHITECTURES[name]
