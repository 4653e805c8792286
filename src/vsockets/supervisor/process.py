"""Access to supervised processes: memory, descriptors, credentials, signals.

A process can change at any time, or end and leave its number to another process.  Data read from a
process are therefore only valid if the system call being served still waits *afterwards*
(:meth:`.interception.InterceptedCall.is_waiting`).
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import AF_UNIX, SHUT_RDWR, SO_DOMAIN, SOCK_STREAM, SOL_SOCKET

from .._linux.inspection import SYS_PIDFD_GETFD
from .._linux.libc import last_error, libc
from .arch import Architecture

_PIDFD_THREAD = os.O_EXCL  # Linux 6.9
#: The number of threads whose descriptors (pidfd, stat) are kept, to save a system call each time.
_KEPT = 256

#: Words in /proc/PID/syscall: number, six arguments, stack pointer, instruction pointer.
_WORDS_OF_CALL = 9

_NO_FLAGS = ctypes.c_ulong(0)  # passed on the stack, where a plain 0 would set only 32 bits

_STDERR = 2
#: Seconds that writing a message to a program's user may take.
_PATIENCE = 2

_READ, _READ_WRITE = os.O_RDONLY | os.O_CLOEXEC, os.O_RDWR | os.O_CLOEXEC
#: Bytes at the start of /proc/PID/stat that include the state.
_STAT_TO_STATE = 64

#: An upper bound of the size of /proc/PID/status, in bytes.
_LONGEST_STATUS = 16_384

#: Bytes that are read without a buffer of their own: addresses and sizes.
_SMALL = 128
#: The longest text for :meth:`Processes.begins_with`, in bytes.
_GLANCE = 16


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Processes:
    """Access to supervised processes, each identified by the number of any of its threads."""

    def __init__(self, machine: Architecture) -> None:
        self._machine = machine
        self._syscall = libc.syscall
        self._pidfds: OrderedDict[int, int] = OrderedDict()
        #: By thread: its open file ``stat`` in /proc, which is read more often than any other.
        self._stats: OrderedDict[int, int] = OrderedDict()
        #: By thread: the inode of its folder in /proc, which differs for a later thread with the
        #: same number, and its process.
        self._process_of: dict[int, tuple[int, int]] = {}
        self._local, self._remote = _Vector(), _Vector()
        self._local_at, self._remote_at = ctypes.byref(self._local), ctypes.byref(self._remote)
        # For read_some() of few bytes.
        self._small = bytearray(_SMALL)
        self._small_view = memoryview(self._small)
        self._small_memory = (ctypes.c_char * _SMALL).from_buffer(self._small)
        self._small_local = _Vector(ctypes.addressof(self._small_memory), _SMALL)
        self._small_at = ctypes.byref(self._small_local)
        # For begins_with(), which is called most.
        self._glance = ctypes.create_string_buffer(_GLANCE)
        self._glance_at = ctypes.byref(_Vector(ctypes.addressof(self._glance), _GLANCE))

    # Memory

    def check_access(self) -> None:
        """Read memory of this process, to check that reading is permitted.

        Raises OSError if a filter forbids the system call.
        """
        self.read(os.getpid(), ctypes.addressof(self._glance), _GLANCE)

    def read(self, pid: int, address: int, size: int) -> bytes:
        """Return ``size`` bytes of memory, read once.

        Raises OSError(EFAULT) if any of them are not mapped.
        """
        data = self.read_some(pid, address, size)
        if len(data) != size:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return data

    def read_some(self, pid: int, address: int, size: int) -> bytes:
        """Return up to ``size`` bytes of memory, fewer where the mapping ends.

        Raises OSError(EFAULT) if none are mapped.
        """
        if size == 0:
            return b""
        if size <= _SMALL:
            self._small_local.length, local = size, self._small_at
        else:
            buffer = ctypes.create_string_buffer(size)
            self._local.base, self._local.length = ctypes.addressof(buffer), size
            local = self._local_at
        self._remote.base, self._remote.length = address, size
        count: int = self._syscall(
            self._machine.process_vm_readv, pid, local, 1, self._remote_at, 1, _NO_FLAGS
        )
        if count < 0:
            raise last_error()
        if size <= _SMALL:
            return self._small_view[:count].tobytes()
        return ctypes.string_at(buffer, count)

    def write_some(self, pid: int, address: int, data: bytes) -> int:
        """Write ``data`` to a process's memory at ``address``; return the number of bytes written.

        Fewer than all, or 0, are written where memory is not mapped.

        Raises OSError if the process may not be examined.
        """
        buffer = ctypes.create_string_buffer(data, len(data))
        self._local.base, self._local.length = ctypes.addressof(buffer), len(data)
        self._remote.base, self._remote.length = address, len(data)
        count: int = self._syscall(
            self._machine.process_vm_writev, pid, self._local_at, 1, self._remote_at, 1, _NO_FLAGS
        )
        if count < 0:
            code = ctypes.get_errno()
            if code == errno.EFAULT:
                return 0
            raise OSError(code, os.strerror(code))
        return count

    def begins_with(self, pid: int, address: int, text: bytes) -> bool:
        """Return whether memory at ``address`` is readable and begins with ``text``."""
        size = len(text)
        assert size <= _GLANCE
        self._remote.base, self._remote.length = address, size
        count: int = self._syscall(
            self._machine.process_vm_readv, pid, self._glance_at, 1, self._remote_at, 1, _NO_FLAGS
        )
        return count == size and self._glance.raw[:size] == text

    @staticmethod
    def arguments_of(pid: int) -> tuple[int, ...]:
        """Return the six arguments of the system call that thread ``pid`` waits in.

        Raises OSError(EAGAIN) if the thread does not wait in a call.
        """
        words = Path(f"/proc/{pid}/syscall").read_text().split()
        if len(words) < _WORDS_OF_CALL:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return tuple(int(word, 0) for word in words[1:7])

    # Descriptors

    @staticmethod
    def what_is(pid: int, fd: int) -> str:
        """Return the target of a descriptor's link in /proc: ``socket:[inode]`` for a socket.

        Empty if the descriptor is not open, or the kernel denies access.
        """
        try:
            return os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            return ""

    def numbers_of(self, pid: int, inode: int) -> list[int]:
        """Return the numbers of a process's descriptors for the socket with this inode."""
        link = f"socket:[{inode}]"
        try:
            numbers = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
        except OSError:
            return []
        return [number for number in numbers if self.what_is(pid, number) == link]

    def duplicate(self, pid: int, fd: int) -> int:
        """Return a copy, in this process, of a thread's descriptor.

        Raises OSError(EBADF) if the descriptor is not open.
        """
        copy: int
        pidfd = self._pidfds.get(pid)
        if pidfd is not None:
            copy = self._syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
            if copy >= 0:
                return copy
            if ctypes.get_errno() != errno.ESRCH:
                raise last_error()
            # The number belongs to a later process.
            os.close(self._pidfds.pop(pid))
        pidfd, is_kept = self._open_pidfd(pid)
        copy = self._syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
        error = last_error()
        if not is_kept:
            os.close(pidfd)
        if copy < 0:
            raise error
        return copy

    def _open_pidfd(self, pid: int) -> tuple[int, bool]:
        """Open a pidfd of a thread; return it, and whether it is kept for later calls.

        The caller closes a pidfd that is not kept.
        """
        pidfd: int = self._syscall(self._machine.pidfd_open, pid, _PIDFD_THREAD)
        if pidfd < 0:  # before Linux 6.9, only the first thread of a process can have one
            pidfd = self._syscall(self._machine.pidfd_open, pid, 0)
            if pidfd < 0:
                return os.pidfd_open(self.first_thread(pid)), False
        if len(self._pidfds) >= _KEPT:
            os.close(self._pidfds.popitem(last=False)[1])
        self._pidfds[pid] = pidfd
        return pidfd, True

    @staticmethod
    def first_thread(pid: int) -> int:
        """Return the number of a thread's process, which is that of its first thread.

        Raises OSError if the thread has ended.
        """
        return int(_status(pid, b"Tgid:")[0])

    def shut_down(self, inode: int) -> bool:
        """Shut down the socket with this inode, if a process with a readable /proc/PID/fd has it.

        Returns whether the socket was found and shut down.
        """
        link = f"socket:[{inode}]"
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended, or access is denied
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    if self.what_is(int(pid), int(fd)) == link:
                        with self._copied(int(pid), int(fd)) as sock:
                            if os.fstat(sock.fileno()).st_ino == inode:
                                sock.shutdown(SHUT_RDWR)
                                return True
        return False

    @contextlib.contextmanager
    def _copied(self, pid: int, fd: int) -> Iterator[_socket.socket]:
        sock = _socket.socket(fileno=self.duplicate(pid, fd))
        try:
            yield sock
        finally:
            sock.close()

    # Credentials

    def credentials(self, pid: int) -> tuple[int, int, int]:
        """Return a thread's process id, effective user and group.

        Raises OSError if the thread has ended.
        """
        folder = os.stat(f"/proc/{pid}")  # has the effective user
        known = self._process_of.get(pid)
        if known is None or known[0] != folder.st_ino:
            if len(self._process_of) >= _KEPT:
                self._process_of.clear()
            known = self._process_of[pid] = folder.st_ino, self.first_thread(pid)
        return known[1], folder.st_uid, folder.st_gid

    @staticmethod
    def has_capability(pid: int, capability: int) -> bool:
        """Return whether a thread has ``capability`` in the supervisor's user namespace.

        False if the kernel denies access.
        """
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino:
                return bool(int(_status(pid, b"CapEff:")[0], 16) >> capability & 1)
        return False

    # Signals and messages

    def has_signal(self, pid: int) -> bool:
        """Return whether a signal has woken a thread from its call and has not been delivered yet.

        False if the kernel denies access.
        """
        try:
            if self._is_asleep(pid):  # nearly always
                return False
            for _ in range(2):  # the thread may be woken between two reads
                state, mine, shared, blocked = _status(
                    pid, b"State:", b"SigPnd:", b"ShdPnd:", b"SigBlk:"
                )
                if not (int(mine, 16) | int(shared, 16)) & ~int(blocked, 16):
                    return False
                if state != b"S":
                    return True
            # Another thread of the process takes the signal.
        except OSError:
            pass
        return False

    def _is_asleep(self, pid: int) -> bool:
        """Return whether a thread sleeps; it does not any longer once a signal has woken it."""
        stat = self._stats.get(pid)
        if stat is not None:
            try:
                return _sleeps(stat)
            except ProcessLookupError:  # the number belongs to a later thread
                os.close(self._stats.pop(pid))
        if len(self._stats) >= _KEPT:
            os.close(self._stats.popitem(last=False)[1])
        stat = self._stats[pid] = os.open(f"/proc/{pid}/task/{pid}/stat", _READ)
        return _sleeps(stat)

    @contextlib.contextmanager
    def opened(self, pid: int) -> Iterator[int]:
        """Open a pidfd of a thread's process, and close it afterwards.

        Raises OSError(ESRCH) if the process has ended.
        """
        pidfd = os.pidfd_open(self.first_thread(pid))
        try:
            yield pidfd
        finally:
            os.close(pidfd)

    @staticmethod
    def executable(pid: int) -> str:
        """Return the path of a process's program in quotes, with special characters escaped."""
        try:
            return repr(os.readlink(f"/proc/{pid}/exe"))
        except OSError:
            return "a program"

    @staticmethod
    def report(
        pid: int,
        text: str,
        duplicate: Callable[[int, int], int],
        is_valid: Callable[[], bool],
    ) -> None:
        """Write a line to the process's standard error, if the process may write to it.

        A copy of the descriptor keeps its access mode; opening ``/proc/PID/fd/2`` would check the
        rights of the supervisor instead.  ``is_valid`` returns whether ``pid`` still is the number
        of that process.

        Raises OSError if the process has ended.
        """
        user = os.stat(f"/proc/{pid}")  # its effective user and group
        stderr = duplicate(pid, _STDERR)
        try:
            if is_valid():
                _write_for(user.st_uid, user.st_gid, stderr, f"vsock run: {text}\n")
        finally:
            os.close(stderr)


def _sleeps(stat: int) -> bool:
    # "PID (NAME) STATE NUMBERS…": the name, which may hold anything, ends within these bytes, and
    # no parenthesis follows it.
    return os.pread(stat, _STAT_TO_STATE, 0).rpartition(b")")[2][1:2] == b"S"


def open_memory(pid: int) -> int:
    """Open the memory that a process has now; return the descriptor.

    The descriptor still refers to that memory after the process has executed another program.

    Raises OSError if the process has ended.
    """
    return os.open(f"/proc/{pid}/mem", _READ_WRITE)


def read_memory(memory: int, address: int, size: int) -> bytes:
    """Read from ``memory``, an open ``/proc/PID/mem``.

    Raises OSError(EFAULT) unless all ``size`` bytes could be read.
    """
    try:
        data = os.pread(memory, size, address)
    except OverflowError:  # beyond the addresses of a process
        data = b""
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        data = b""
    if len(data) != size:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return data


def write_memory(memory: int, address: int, data: bytes) -> bool:
    """Write ``data`` to ``memory``, an open ``/proc/PID/mem``; return False if no byte was written.

    Raises OSError(EFAULT) unless all of ``data`` could be written.
    """
    if not data:
        return True
    try:
        count = os.pwrite(memory, data, address)
    except OverflowError:  # beyond the addresses of a process
        count = -1
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        count = -1
    if count not in (0, len(data)):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return count > 0


def _write_for(uid: int, gid: int, fd: int, text: str) -> None:
    """Write to a copy of another process's descriptor, with the credentials of that process.

    A child process writes, because that may block: on a pipe without reader, a stopped terminal.
    """
    if os.fork():
        return  # ``launch`` reaps all children
    try:
        os.closerange(0, fd)
        os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.alarm(_PATIENCE)
        if os.geteuid() == 0 and (uid, gid) != (0, 0):  # a container's root may lack the right
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        os.write(fd, text.encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _status(pid: int, *fields: bytes) -> list[bytes]:
    """Return the first word of each field in a thread's ``status`` in /proc.

    Raises OSError if the thread has ended.
    """
    fd = os.open(f"/proc/{pid}/status", _READ)
    try:
        status = os.read(fd, _LONGEST_STATUS)
    finally:
        os.close(fd)
    return [status.partition(b"\n" + field)[2].split(None, 1)[0] for field in fields]


def inherited_sockets(family: int) -> list[int]:
    """Return the inheritable descriptors of this process that are sockets of ``family``.

    A filter has no effect on sockets made before it.
    """
    found = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        # OSError: it is not a socket, or was the listing's own descriptor.
        with contextlib.suppress(OSError):
            if os.get_inheritable(fd) and _family_of(fd) == family:
                found.append(fd)
    return found


def _family_of(fd: int) -> int:
    # Asks the kernel: a Python object has the family it was constructed with.
    sock = _socket.socket(AF_UNIX, SOCK_STREAM, 0, fd)
    try:
        return sock.getsockopt(SOL_SOCKET, SO_DOMAIN)
    finally:
        sock.detach()
