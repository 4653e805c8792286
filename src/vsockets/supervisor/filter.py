"""The seccomp filter: which system calls the kernel asks the supervisor about.

A filter is a program in classic BPF that sees a call's number and its six arguments as numbers,
and no memory.  It is made here from *rules*, which are data: a call, conditions on arguments,
and what is to happen.  The first rule that fits decides; a call that no rule names is let
through, and the kernel remembers that, so such calls cost nothing (Linux 5.11).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from ..model.constants import AF_VSOCK
from .arch import FIRST_X32_CALL, Architecture

ALLOW = 0x7FFF_0000
NOTIFY = 0x7FC0_0000
#: What tells the events of our own filters from those of a program's.
TRACE_MARK = 0x7653
TRACE = 0x7FF0_0000 | TRACE_MARK
_REFUSE = 0x0005_0000
_SYS_SECCOMP_ENOSYS = 38
_EPERM = 1
_EOPNOTSUPP = 95

#: VMware's and Linux's ioctls of ``/dev/vsock``: protocol version, address family, local CID.
IOCTL_VERSION, IOCTL_AF_VALUE, IOCTL_LOCAL_CID = 0x7B4, 0x7B8, 0x7B9
#: ``linux/vhost.h``: the two that make a process the hypervisor of the machine's own AF_VSOCK.
_VHOST_VSOCK_SET_GUEST_CID, _VHOST_VSOCK_SET_RUNNING = 0x4008_AF60, 0x4004_AF61

#: Bytes that have not reached the peer yet; for terminals it is TIOCOUTQ.
SIOCOUTQ = 0x5411
MSG_ERRQUEUE = 0x2000

#: The commands of fcntl() that copy a descriptor.
COPYING = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC)

_ANYBODYS = stat.S_IROTH | stat.S_IWOTH
_AT_FDCWD = 0xFFFF_FF9C
#: Options of level SOL_SOCKET that a unix socket answers otherwise than AF_VSOCK.
ASKED_OPTIONS = (
    socket.SO_ERROR,
    socket.SO_DOMAIN,
    socket.SO_ACCEPTCONN,
    socket.SO_PEERCRED,
)
#: Nobody opens ``/dev/vsock`` with any of these; compilers and shells open most files so.
_OTHER_OPEN_FLAGS = (
    os.O_WRONLY
    | os.O_CREAT
    | os.O_EXCL
    | os.O_NOCTTY
    | os.O_TRUNC
    | os.O_APPEND
    | os.O_DIRECTORY
    | os.O_PATH
)

# Instructions of classic BPF (linux/filter.h).
_LOAD, _RETURN = 0x20, 0x06
_IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45
# Offsets in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_LAST_JUMP = 255


def refuse(errno: int) -> int:
    """The filter's answer that fails a call with ``errno``, without asking anybody."""
    return _REFUSE | errno


class ArgumentCondition(Enum):
    """A condition on an argument; the kernel's ``int`` arguments are its lower 32 bits."""

    __test__ = False  # pytest: not what you think

    EQUAL = "=="
    DIFFERS = "!="
    AT_LEAST = ">="
    BELOW = "<"
    HAS_BIT = "any bit of"
    LACKS_BITS = "no bit of"
    NOT_NULL = "all 64 bits != 0"


class When(NamedTuple):
    """One condition: argument number, test, and what it is compared with."""

    argument: int
    test: ArgumentCondition
    value: int = 0


class Rule(NamedTuple):
    """What happens to a system call when all conditions hold."""

    number: int
    action: int
    when: tuple[When, ...] = ()


class Numbers(NamedTuple):
    """Descriptor numbers from ``first`` up to, not including, ``end``."""

    first: int
    end: int

    def holds(self, argument: int = 0) -> tuple[When, ...]:
        """The conditions that a call is about one of these descriptors."""
        if self.end == self.first + 1:
            return (When(argument, ArgumentCondition.EQUAL, self.first),)
        return When(argument, ArgumentCondition.AT_LEAST, self.first), When(
            argument, ArgumentCondition.BELOW, self.end
        )


class Served(Enum):
    """Sockets whose data calls are served, and so traced by the numbers of their descriptors."""

    DATAGRAM = "datagram"
    PACKET = "packet"


def may_be_opened(device: str = "/dev/vsock") -> bool:
    """Whether the machine has the device, and lets everybody open it.

    Then it need not be opened for a program: nothing can be done with it but the ioctls, which
    are intercepted on every descriptor.
    """
    try:
        mode = os.stat(device).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) and mode & _ANYBODYS == _ANYBODYS


def rules(machine: Architecture, opens: bool, looks: bool = False) -> list[Rule]:
    """What ``vsock run`` intercepts; with ``opens``, the opening of ``/dev/vsock`` too, and with
    ``looks``, whatever asks whether it is there.
    """
    m, equal, differs = machine, ArgumentCondition.EQUAL, ArgumentCondition.DIFFERS
    vsock = When(0, equal, AF_VSOCK)
    asked = [When(2, equal, int(option)) for option in ASKED_OPTIONS]
    end_of_record = ArgumentCondition.HAS_BIT, int(socket.MSG_EOR)
    urgent = int(socket.MSG_OOB)
    plain_open = ArgumentCondition.LACKS_BITS, _OTHER_OPEN_FLAGS
    made = [
        Rule(m.socket, NOTIFY, (vsock,)),
        Rule(m.socketpair, refuse(_EOPNOTSUPP), (vsock,)),
        *(
            Rule(number, NOTIFY)
            for number in (
                *(m.bind, m.listen, m.accept, m.accept4, m.connect),
                *(m.getsockname, m.getpeername, m.shutdown),
            )
        ),
        # Options: those of our level, a few of the socket's own, and those of other families,
        # which are accepted and ignored (guide page 8).
        Rule(m.setsockopt, NOTIFY, (When(1, differs, socket.SOL_SOCKET),)),
        Rule(m.getsockopt, NOTIFY, (When(1, differs, socket.SOL_SOCKET),)),
        *(Rule(m.getsockopt, NOTIFY, (option,)) for option in asked),
        *(
            Rule(m.ioctl, NOTIFY, (When(1, equal, request),))
            for request in (IOCTL_VERSION, IOCTL_AF_VALUE, IOCTL_LOCAL_CID)
        ),
        *(
            Rule(m.ioctl, refuse(_EPERM), (When(1, equal, request),))
            for request in (_VHOST_VSOCK_SET_GUEST_CID, _VHOST_VSOCK_SET_RUNNING)
        ),
        Rule(m.ioctl, NOTIFY, (When(1, equal, SIOCOUTQ),)),
        *(
            [
                Rule(m.openat, NOTIFY, (When(0, equal, _AT_FDCWD), When(2, *plain_open))),
                Rule(m.open, NOTIFY, (When(1, *plain_open),)),
            ]
            if opens
            else []
        ),
        *(
            [
                *(
                    Rule(number, NOTIFY, (When(0, equal, _AT_FDCWD),))
                    for number in (m.newfstatat, m.statx, m.faccessat, m.faccessat2)
                ),
                *(Rule(number, NOTIFY) for number in (m.stat, m.lstat, m.access)),
            ]
            if looks
            else []
        ),
        # Ends of records, which a unix socket does not carry.
        Rule(m.sendto, NOTIFY, (When(3, *end_of_record),)),
        Rule(m.sendmsg, NOTIFY, (When(2, *end_of_record),)),
        # Flags that mean something else to a unix socket.
        Rule(m.recvmsg, NOTIFY, (When(2, ArgumentCondition.HAS_BIT, MSG_ERRQUEUE | urgent),)),
        Rule(m.recvfrom, NOTIFY, (When(3, ArgumentCondition.HAS_BIT, MSG_ERRQUEUE | urgent),)),
        Rule(m.sendmsg, NOTIFY, (When(2, ArgumentCondition.HAS_BIT, urgent),)),
        Rule(m.sendto, NOTIFY, (When(3, ArgumentCondition.HAS_BIT, urgent),)),
        # A ring would make sockets, and open files, without a system call.
        Rule(m.io_uring_setup, refuse(_SYS_SECCOMP_ENOSYS)),
        Rule(m.io_uring_enter, refuse(_SYS_SECCOMP_ENOSYS)),
        Rule(m.io_uring_register, refuse(_SYS_SECCOMP_ENOSYS)),
    ]
    return [rule for rule in made if rule.number >= 0]


def traced_rules(machine: Architecture, kind: Served, numbers: Numbers) -> list[Rule]:
    """What is traced of descriptors with these numbers: data calls that are served, and copies.

    Of datagram sockets, all that sends, and receiving with the source's address.  Of packet
    sockets, receiving ends of records, and sending with an address, which fails.
    """
    m, ours = machine, numbers.holds()
    calls: list[tuple[int, tuple[When, ...]]] = [(m.recvmsg, ours)]
    if kind is Served.DATAGRAM:
        calls += [(number, ours) for number in (m.sendto, m.sendmsg, m.sendmmsg, m.write, m.writev)]
        calls += [(m.recvmmsg, ours), (m.recvfrom, (*ours, When(4, ArgumentCondition.NOT_NULL)))]
    else:
        calls.append((m.sendto, (*ours, When(4, ArgumentCondition.NOT_NULL))))
    calls += [(number, ours) for number in (m.dup, m.dup2, m.dup3)]
    calls += [(m.fcntl, (*ours, When(1, ArgumentCondition.EQUAL, command))) for command in COPYING]
    return [Rule(number, TRACE, when) for number, when in calls if number >= 0]


def assemble(machine: Architecture, made: Sequence[Rule], is_first: bool = True) -> bytes:
    """The BPF program of ``made``, for ``seccomp(2)``.

    A program of another architecture is asked about at every call: its numbers mean something
    else.  The calls of x32 do not exist.  Both are the business of a process's first filter.
    """
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_IF_EQUAL, machine.architecture, 1, 0),
        _instruction(_RETURN, NOTIFY if is_first else ALLOW),
        _instruction(_LOAD, _NUMBER),
        _instruction(_IF_AT_LEAST, FIRST_X32_CALL, 0, 1),
        _instruction(_RETURN, refuse(_SYS_SECCOMP_ENOSYS) if is_first else ALLOW),
    ]
    for rule in made:
        program += _assemble_rule(rule)
    program.append(_instruction(_RETURN, ALLOW))
    return b"".join(program)


def _assemble_rule(rule: Rule) -> list[bytes]:
    body = [step for condition in rule.when for step in _steps(condition)]
    # A condition that does not hold jumps behind the rule: over what follows it, and the return.
    lines = [_instruction(_LOAD, _NUMBER), _instruction(_IF_EQUAL, rule.number, 0, len(body) + 1)]
    for at, (code, constant, holds_if, last) in enumerate(body):
        rest = len(body) - at
        assert rest <= _LAST_JUMP
        if code == _LOAD:
            lines.append(_instruction(code, constant))
        elif last:
            lines.append(_instruction(code, constant, *((0, rest) if holds_if else (rest, 0))))
        else:  # the first half of a 64-bit test: true already, so over the second half
            lines.append(_instruction(code, constant, *((2, 0) if holds_if else (0, 2))))
    lines.append(_instruction(_RETURN, rule.action))
    return lines


def _steps(condition: When) -> Iterator[tuple[int, int, bool, bool]]:
    """(instruction, constant, whether it holds if the comparison does, whether it is the last)."""
    low = _ARGUMENTS + 8 * condition.argument
    code, holds_if = {
        ArgumentCondition.EQUAL: (_IF_EQUAL, True),
        ArgumentCondition.DIFFERS: (_IF_EQUAL, False),
        ArgumentCondition.AT_LEAST: (_IF_AT_LEAST, True),
        ArgumentCondition.BELOW: (_IF_AT_LEAST, False),
        ArgumentCondition.HAS_BIT: (_IF_ANY_BIT, True),
        ArgumentCondition.LACKS_BITS: (_IF_ANY_BIT, False),
        ArgumentCondition.NOT_NULL: (_IF_EQUAL, False),
    }[condition.test]
    value = condition.value & 0xFFFF_FFFF
    if condition.test is ArgumentCondition.NOT_NULL:
        value = 0
        yield _LOAD, low + 4, True, False
        yield code, 0, False, False
    yield _LOAD, low, True, True
    yield code, value, holds_if, True


def _instruction(code: int, constant: int, if_so: int = 0, if_not: int = 0) -> bytes:
    # The two jump distances count the instructions to skip.
    return struct.pack("=HBBI", code, if_so, if_not, constant)
