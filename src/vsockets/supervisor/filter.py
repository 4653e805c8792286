"""The seccomp filters, which select the system calls to intercept.

A filter is a program in classic BPF that sees a call's number and the values of its six arguments,
but no memory.  A filter is assembled here from *rules*: a call, conditions on arguments, and an
action.  The first rule that matches decides.  A call without a rule is allowed, and the kernel
caches that (Linux 5.11), so that such calls cost nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from .._linux.bpf import (
    ALLOW,
    ARCHITECTURE,
    ARGUMENTS,
    IF_ANY_BIT,
    IF_AT_LEAST,
    IF_EQUAL,
    LAST_JUMP,
    LOAD,
    NOTIFY,
    NUMBER,
    RETURN,
    SET_MODE_FILTER,
    TRACE,
    TRAP,
    instruction,
    refuse,
)
from ..model.constants import AF_VSOCK
from .arch import FIRST_X32_CALL, Architecture
from .ptrace import TRACING_REQUESTS

#: Distinguishes events of the supervisor's filters from those of a program's own.
TRACE_MARK = 0x7653
MARKED_TRACE = TRACE | TRACE_MARK
#: A SIGSYS for the thread; stricter than an errno of another filter.
MARKED_TRAP = TRAP | TRACE_MARK

#: VMware's and Linux's ioctls of ``/dev/vsock``: protocol version, address family, local CID.
IOCTL_VERSION, IOCTL_AF_VALUE, IOCTL_LOCAL_CID = 0x7B4, 0x7B8, 0x7B9
#: ``linux/vhost.h``: the ioctls that make a process the hypervisor of the kernel's AF_VSOCK.
_VHOST_VSOCK_SET_GUEST_CID, _VHOST_VSOCK_SET_RUNNING = 0x4008_AF60, 0x4004_AF61

#: The ioctl for the bytes that have not reached the peer yet; TIOCOUTQ for terminals.
SIOCOUTQ = 0x5411
MSG_ERRQUEUE = 0x2000

#: In seccomp()'s last argument, which has no meaning: the supervisor has the thread make the call.
OWN_CALL = 0x7653_0001
_STRICT_MODE, _PR_SET_SECCOMP = 0, 22

#: The commands of fcntl() that copy a descriptor.
COPYING = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC)

_OTHERS_READ_WRITE = stat.S_IROTH | stat.S_IWOTH
_AT_FDCWD = 0xFFFF_FF9C
#: Options of level SOL_SOCKET whose values differ between unix sockets and AF_VSOCK.
ASKED_OPTIONS = (
    socket.SO_ERROR,
    socket.SO_DOMAIN,
    socket.SO_ACCEPTCONN,
    socket.SO_PEERCRED,
)
#: Flags that no open() of ``/dev/vsock`` has, but most of compilers and shells.
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


class ArgumentCondition(Enum):
    """A comparison of an argument's lower 32 bits, which are the kernel's ``int``."""

    EQUAL = "=="
    DIFFERS = "!="
    AT_LEAST = ">="
    BELOW = "<"
    HAS_BIT = "any bit of"
    LACKS_BITS = "no bit of"
    NOT_NULL = "all 64 bits != 0"


class When(NamedTuple):
    """A condition on one argument: its index, the comparison, and the other operand."""

    argument: int
    test: ArgumentCondition
    value: int = 0


class Rule(NamedTuple):
    """An action for a system call that meets all conditions."""

    number: int
    action: int
    when: tuple[When, ...] = ()


class Numbers(NamedTuple):
    """Descriptor numbers from ``first`` up to, but not including, ``end``."""

    first: int
    end: int

    def holds(self, argument: int = 0) -> tuple[When, ...]:
        """Return the conditions under which a call's argument is one of these descriptors."""
        if self.end == self.first + 1:
            return (When(argument, ArgumentCondition.EQUAL, self.first),)
        return When(argument, ArgumentCondition.AT_LEAST, self.first), When(
            argument, ArgumentCondition.BELOW, self.end
        )


class Served(Enum):
    """Kinds of sockets on which the supervisor serves not only connects, but also data calls."""

    DATAGRAM = "datagram"
    PACKET = "packet"


def may_be_opened(device: str = "/dev/vsock") -> bool:
    """Return whether the machine has ``/dev/vsock``, with read and write permission for all users.

    If so, the kernel may open the device for a program: it is only used by ioctls, which are
    intercepted on every descriptor.
    """
    try:
        mode = os.stat(device).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) and mode & _OTHERS_READ_WRITE == _OTHERS_READ_WRITE


class Rules(NamedTuple):
    """The rules of ``vsock run``, for one filter or two.

    No call on a socket needs interception before a program has its first vSockets socket.  So
    ``first`` has only the calls by which a program gets one, or prevents the second filter from
    being installed.  ``all`` are those and the calls on sockets.
    """

    first: list[Rule]
    all: list[Rule]

    @classmethod
    def of(cls, machine: Architecture, opens: bool, looks: bool = False) -> Rules:
        """Return the rules; the arguments are those of :func:`rules`."""
        creating = _creating_rules(machine, opens, looks)
        beginning = _beginning_rules(machine)
        sockets = _socket_rules(machine)
        return cls(
            _existing([*creating, *beginning, *_received_rules(machine)]),
            _existing([*creating, *beginning, *sockets]),
        )


def rules(machine: Architecture, opens: bool, looks: bool = False) -> list[Rule]:
    """Return the rules of a single filter.

    With ``opens``, these include open() of ``/dev/vsock``; with ``looks``, calls such as stat()
    that check for its existence.
    """
    return _existing([*_creating_rules(machine, opens, looks), *_socket_rules(machine)])


def _existing(made: list[Rule]) -> list[Rule]:
    return [rule for rule in made if rule.number >= 0]


def _beginning_rules(machine: Architecture) -> list[Rule]:
    """Return the rules of calls before which the second filter has to be installed.

    A process that is traced, or has a filter of its own, may not be able to install it.
    """
    m, equal = machine, ArgumentCondition.EQUAL
    not_ours = When(5, ArgumentCondition.DIFFERS, OWN_CALL)
    return [
        *(Rule(m.ptrace, NOTIFY, (When(0, equal, request),)) for request in TRACING_REQUESTS),
        Rule(m.seccomp, NOTIFY, (When(0, equal, SET_MODE_FILTER), not_ours)),
        Rule(m.seccomp, NOTIFY, (When(0, equal, _STRICT_MODE),)),
        Rule(m.prctl, NOTIFY, (When(0, equal, _PR_SET_SECCOMP),)),
    ]


def _received_rules(machine: Architecture) -> list[Rule]:
    """Return the rules of calls that a program usually makes first on a socket that it was given.

    A process outside can have given it a vSockets socket.
    """
    m = machine
    options = (socket.SO_DOMAIN, socket.SO_ACCEPTCONN)
    return [
        *(Rule(number, NOTIFY) for number in (m.bind, m.listen, m.getsockname)),
        *(
            Rule(m.getsockopt, NOTIFY, (When(2, ArgumentCondition.EQUAL, int(option)),))
            for option in options
        ),
    ]


def _creating_rules(machine: Architecture, opens: bool, looks: bool) -> list[Rule]:
    """Return the rules of calls that could reach the machine's own AF_VSOCK."""
    m, equal = machine, ArgumentCondition.EQUAL
    vsock = When(0, equal, AF_VSOCK)
    plain_open = ArgumentCondition.LACKS_BITS, _OTHER_OPEN_FLAGS
    return [
        Rule(m.socket, NOTIFY, (vsock,)),
        Rule(m.socketpair, refuse(errno.EOPNOTSUPP), (vsock,)),
        *(
            Rule(m.ioctl, NOTIFY, (When(1, equal, request),))
            for request in (IOCTL_VERSION, IOCTL_AF_VALUE, IOCTL_LOCAL_CID)
        ),
        *(
            Rule(m.ioctl, refuse(errno.EPERM), (When(1, equal, request),))
            for request in (_VHOST_VSOCK_SET_GUEST_CID, _VHOST_VSOCK_SET_RUNNING)
        ),
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
        # A ring would create sockets and open files without system calls.
        Rule(m.io_uring_setup, refuse(errno.ENOSYS)),
        Rule(m.io_uring_enter, refuse(errno.ENOSYS)),
        Rule(m.io_uring_register, refuse(errno.ENOSYS)),
    ]


def _socket_rules(machine: Architecture) -> list[Rule]:
    """Return the rules of calls on sockets."""
    m, equal, differs = machine, ArgumentCondition.EQUAL, ArgumentCondition.DIFFERS
    asked = [When(2, equal, int(option)) for option in ASKED_OPTIONS]
    end_of_record = ArgumentCondition.HAS_BIT, int(socket.MSG_EOR)
    urgent = int(socket.MSG_OOB)
    return [
        *(
            Rule(number, NOTIFY)
            for number in (
                *(m.bind, m.listen, m.accept, m.accept4, m.connect),
                *(m.getsockname, m.getpeername, m.shutdown),
            )
        ),
        # Options of level AF_VSOCK, some of the socket's own, and those of other families, which
        # are accepted without effect (guide page 8).
        Rule(m.setsockopt, NOTIFY, (When(1, differs, socket.SOL_SOCKET),)),
        Rule(m.getsockopt, NOTIFY, (When(1, differs, socket.SOL_SOCKET),)),
        *(Rule(m.getsockopt, NOTIFY, (option,)) for option in asked),
        Rule(m.ioctl, NOTIFY, (When(1, equal, SIOCOUTQ),)),
        # Ends of records: a unix socket does not carry them.
        Rule(m.sendto, NOTIFY, (When(3, *end_of_record),)),
        Rule(m.sendmsg, NOTIFY, (When(2, *end_of_record),)),
        # Flags with another meaning on a unix socket.
        Rule(m.recvmsg, NOTIFY, (When(2, ArgumentCondition.HAS_BIT, MSG_ERRQUEUE | urgent),)),
        Rule(m.recvfrom, NOTIFY, (When(3, ArgumentCondition.HAS_BIT, MSG_ERRQUEUE | urgent),)),
        Rule(m.sendmsg, NOTIFY, (When(2, ArgumentCondition.HAS_BIT, urgent),)),
        Rule(m.sendto, NOTIFY, (When(3, ArgumentCondition.HAS_BIT, urgent),)),
    ]


def traced_rules(machine: Architecture, kind: Served, numbers: Numbers) -> list[Rule]:
    """Return the rules that trace data calls on, and copies of, descriptors with these numbers.

    Data calls of datagram sockets are all that send, and those that receive the source's address;
    of packet sockets, receiving ends of records, and sending with an address, which fails.
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
    return [Rule(number, MARKED_TRACE, when) for number, when in calls if number >= 0]


def assemble(
    machine: Architecture, made: Sequence[Rule], is_first: bool = True, other: int = NOTIFY
) -> bytes:
    """Return the BPF program of the rules ``made``, for ``seccomp(2)``.

    The first filter of a process also has the action ``other`` for every call of another
    architecture, whose numbers have other meanings, and fails those of x32 with ENOSYS.
    """
    program = [
        instruction(LOAD, ARCHITECTURE),
        instruction(IF_EQUAL, machine.architecture, 1, 0),
        instruction(RETURN, other if is_first else ALLOW),
        instruction(LOAD, NUMBER),
        instruction(IF_AT_LEAST, FIRST_X32_CALL, 0, 1),
        instruction(RETURN, refuse(errno.ENOSYS) if is_first else ALLOW),
    ]
    for rule in made:
        program += _assemble_rule(rule)
    program.append(instruction(RETURN, ALLOW))
    return b"".join(program)


def _assemble_rule(rule: Rule) -> list[bytes]:
    body = [step for condition in rule.when for step in _steps(condition)]
    # A condition that fails jumps behind the rule: over the other conditions and the return.
    lines = [instruction(LOAD, NUMBER), instruction(IF_EQUAL, rule.number, 0, len(body) + 1)]
    for at, (code, constant, holds_if, last) in enumerate(body):
        rest = len(body) - at
        assert rest <= LAST_JUMP
        if code == LOAD:
            lines.append(instruction(code, constant))
        elif last:
            lines.append(instruction(code, constant, *((0, rest) if holds_if else (rest, 0))))
        else:  # the first half of a 64-bit comparison decides: jump over the second half
            lines.append(instruction(code, constant, *((2, 0) if holds_if else (0, 2))))
    lines.append(instruction(RETURN, rule.action))
    return lines


def _steps(condition: When) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield the instructions of a condition, each with its constant and two flags.

    The flags are whether the condition holds if the comparison does, and whether the instruction
    is the last one.
    """
    low = ARGUMENTS + 8 * condition.argument
    code, holds_if = {
        ArgumentCondition.EQUAL: (IF_EQUAL, True),
        ArgumentCondition.DIFFERS: (IF_EQUAL, False),
        ArgumentCondition.AT_LEAST: (IF_AT_LEAST, True),
        ArgumentCondition.BELOW: (IF_AT_LEAST, False),
        ArgumentCondition.HAS_BIT: (IF_ANY_BIT, True),
        ArgumentCondition.LACKS_BITS: (IF_ANY_BIT, False),
        ArgumentCondition.NOT_NULL: (IF_EQUAL, False),
    }[condition.test]
    value = condition.value & 0xFFFF_FFFF
    if condition.test is ArgumentCondition.NOT_NULL:
        value = 0
        yield LOAD, low + 4, True, False
        yield code, 0, False, False
    yield LOAD, low, True, True
    yield code, value, holds_if, True
