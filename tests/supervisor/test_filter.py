"""The filter, executed by an interpreter of classic BPF, as the kernel would."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets._linux import bpf
from vsockets._linux.bpf import ALLOW, NOTIFY, refuse
from vsockets.supervisor import filter as seccomp
from vsockets.supervisor.arch import ARCHITECTURES, Architecture
from vsockets.supervisor.filter import (
    OWN_CALL,
    TRACE_MARK,
    ArgumentCondition,
    Numbers,
    Rule,
    Rules,
    Served,
    When,
)

MACHINES = list(ARCHITECTURES.values())
X86 = ARCHITECTURES["x86_64"]
TRACE = bpf.TRACE | TRACE_MARK

numbers = st.integers(0, 500)
words = st.one_of(
    st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, 40, 1 << 32, 40 | 1 << 32, 0xFFFFFFFF])
)
conditions = st.builds(
    When, st.integers(0, 5), st.sampled_from(list(ArgumentCondition)), st.integers(0, (1 << 32) - 1)
)
rules = st.builds(
    Rule, numbers, st.sampled_from([NOTIFY, refuse(1)]), st.lists(conditions, max_size=4).map(tuple)
)


class SystemCall(NamedTuple):
    number: int
    arguments: tuple[int, ...] = (0,) * 6
    architecture: int = X86.architecture


def run(program: bytes, call: SystemCall) -> int:
    """Return what the kernel's BPF machine would."""
    data = struct.pack("=iIQ6Q", call.number, call.architecture, 0, *call.arguments)
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        code, if_so, if_not, constant = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, constant)
        elif code == 0x06:
            return int(constant)
        else:
            holds = {
                0x15: accumulator == constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[code]
            at += if_so if holds else if_not


def holds(condition: When, call: SystemCall) -> bool:
    argument = call.arguments[condition.argument]
    low = argument & 0xFFFFFFFF
    return {
        ArgumentCondition.EQUAL: low == condition.value,
        ArgumentCondition.DIFFERS: low != condition.value,
        ArgumentCondition.AT_LEAST: low >= condition.value,
        ArgumentCondition.BELOW: low < condition.value,
        ArgumentCondition.HAS_BIT: bool(low & condition.value),
        ArgumentCondition.LACKS_BITS: not low & condition.value,
        ArgumentCondition.NOT_NULL: argument != 0,
    }[condition.test]


def decide(made: list[Rule], call: SystemCall) -> int:
    for rule in made:
        if rule.number == call.number and all(holds(one, call) for one in rule.when):
            return rule.action
    return ALLOW


@given(
    st.lists(rules, max_size=8),
    st.builds(SystemCall, numbers, st.tuples(*[words] * 6), st.just(X86.architecture)),
    st.integers(0, 7),
)
def test_the_program_implements_the_rules(made: list[Rule], call: SystemCall, chosen: int) -> None:
    if chosen < len(made):  # a call with a rule
        call = call._replace(number=made[chosen].number)
    assert run(seccomp.assemble(X86, made), call) == decide(made, call)


@pytest.fixture(params=MACHINES, ids=list(ARCHITECTURES))
def machine(request: pytest.FixtureRequest) -> Architecture:
    found: Architecture = request.param
    return found


def ask(machine: Architecture, number: int, *arguments: int) -> int:
    program = seccomp.assemble(machine, seccomp.rules(machine, True))
    assert len(program) // 8 <= 4096  # BPF_MAXINSNS
    padded = (*arguments, *[0] * (6 - len(arguments)))
    return run(program, SystemCall(number, padded, machine.architecture))


@given(st.integers(0, (1 << 32) - 1), words, words)
def test_af_vsock_never_reaches_the_kernel(high: int, kind: int, protocol: int) -> None:
    # The kernel reads the lower 32 bits of an int.
    for machine in MACHINES:
        for made in (seccomp.rules(machine, True), *Rules.of(machine, True)):
            program = seccomp.assemble(machine, made)
            family = 40 | high << 32
            call = SystemCall(machine.socket, (family, kind, protocol, 0, 0, 0))
            assert run(program, call._replace(architecture=machine.architecture)) == NOTIFY
            call = SystemCall(machine.socketpair, (family, kind, 0, 0, 0, 0))
            assert run(program, call._replace(architecture=machine.architecture)) == refuse(95)


@given(st.integers(0, 450), st.tuples(*[words] * 6))
def test_the_first_filter_leaves_nothing_to_the_kernel_that_the_second_does_not(
    number: int, arguments: tuple[int, ...]
) -> None:
    for machine in MACHINES:
        call = SystemCall(number, arguments, machine.architecture)
        first, second = (
            run(seccomp.assemble(machine, made), call) for made in Rules.of(machine, True, True)
        )
        assert second <= first


def test_the_first_filter_allows_calls_on_sockets(machine: Architecture) -> None:
    first, _ = Rules.of(machine, True)
    program = seccomp.assemble(machine, first)
    for number in (
        *(machine.accept, machine.accept4, machine.connect, machine.getpeername),
        *(machine.shutdown, machine.setsockopt, machine.sendto, machine.recvmsg),
    ):
        assert run(program, SystemCall(number, (3, 6, 1, 1, 4, 0), machine.architecture)) == ALLOW


def test_a_second_filter_comes_before_what_prevents_it(machine: Architecture) -> None:
    for made in Rules.of(machine, True):
        program = seccomp.assemble(machine, made)

        def asked(number: int, *arguments: int, program: bytes = program) -> int:
            padded = (*arguments, *[0] * (6 - len(arguments)))
            return run(program, SystemCall(number, padded, machine.architecture))

        for request in (0, 16, 0x4206):  # TRACEME, ATTACH, SEIZE
            assert asked(machine.ptrace, request, 7) == NOTIFY
        assert asked(machine.ptrace, 7, 7) == ALLOW
        assert asked(machine.seccomp, 1, 0, 1 << 40) == NOTIFY
        assert asked(machine.seccomp, 1, 9, 1 << 40, 0, 0, OWN_CALL) == ALLOW
        assert asked(machine.prctl, 22, 2) == NOTIFY
        assert asked(machine.prctl, 38, 1) == ALLOW


def test_af_vsock_is_refused_by_all_other_ways(machine: Architecture) -> None:
    for ring in (machine.io_uring_setup, machine.io_uring_enter, machine.io_uring_register):
        assert ask(machine, ring) == refuse(38)
    assert ask(machine, 0x4000_0000 + machine.socket, 40, 1) == refuse(38)  # x32
    for request in (0x4008AF60, 0x4004AF61):  # become the kernel's hypervisor
        assert ask(machine, machine.ioctl, 5, request) == refuse(1)
    program = seccomp.assemble(machine, seccomp.rules(machine, True))
    for number in range(500):  # numbers of 32-bit programs differ
        assert run(program, SystemCall(number, architecture=0x40000003)) == NOTIFY


def test_data_calls_are_allowed(machine: Architecture) -> None:
    for fd in (0, 3, 767, 1024, 70_000):
        for number in (
            *(machine.sendto, machine.sendmsg, machine.recvmsg, machine.sendmmsg),
            *(machine.recvmmsg, machine.write, machine.writev),
        ):
            assert ask(machine, number, fd) == ALLOW
        assert ask(machine, machine.recvfrom, fd, 1, 1, 0, 1 << 40, 1) == ALLOW
    for fd in (0, 3, 70_000):
        assert ask(machine, machine.sendto, fd, 1, 1, int(socket.MSG_EOR)) == NOTIFY
        assert ask(machine, machine.sendmsg, fd, 1, int(socket.MSG_EOR)) == NOTIFY


def ask_later(machine: Architecture, kind: Served, number: int, *arguments: int) -> int:
    rules = seccomp.traced_rules(machine, kind, Numbers(8, 16))
    program = seccomp.assemble(machine, rules, is_first=False)
    padded = (*arguments, *[0] * (6 - len(arguments)))
    return run(program, SystemCall(number, padded, machine.architecture))


def test_data_calls_on_covered_descriptors_are_traced(machine: Architecture) -> None:
    for fd, answer in ((7, ALLOW), (8, TRACE), (15, TRACE), (16, ALLOW), (1 << 32 | 9, TRACE)):
        for kind in Served:
            assert ask_later(machine, kind, machine.recvmsg, fd) == answer
            assert ask_later(machine, kind, machine.dup, fd) == answer
            assert ask_later(machine, kind, machine.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 3) == answer
            assert ask_later(machine, kind, machine.fcntl, fd, fcntl.F_GETFL) == ALLOW
            assert ask_later(machine, kind, machine.sendto, fd, 1, 1, 0, 1 << 40, 16) == answer
        for number in (machine.write, machine.sendmsg, machine.sendmmsg, machine.recvmmsg):
            assert ask_later(machine, Served.DATAGRAM, number, fd) == answer
            assert ask_later(machine, Served.PACKET, number, fd) == ALLOW
        arguments = (fd, 1, 1, 0, 0)
        assert ask_later(machine, Served.DATAGRAM, machine.recvfrom, *arguments) == ALLOW
        assert ask_later(machine, Served.PACKET, machine.sendto, *arguments) == ALLOW
        arguments = (fd, 1, 1, 0, 1 << 40)
        assert ask_later(machine, Served.DATAGRAM, machine.recvfrom, *arguments) == answer
    other = SystemCall(machine.recvmsg, (8, 0, 0, 0, 0, 0), 0x40000003)
    rules = seccomp.traced_rules(machine, Served.DATAGRAM, Numbers(8, 9))
    assert run(seccomp.assemble(machine, rules, is_first=False), other) == ALLOW


def test_other_options_and_files_are_allowed(machine: Architecture) -> None:
    assert ask(machine, machine.setsockopt, 3, socket.SOL_SOCKET, socket.SO_REUSEADDR) == ALLOW
    assert ask(machine, machine.setsockopt, 3, socket.IPPROTO_TCP, socket.TCP_NODELAY) == NOTIFY
    assert ask(machine, machine.getsockopt, 3, socket.SOL_SOCKET, socket.SO_SNDBUF) == ALLOW
    assert ask(machine, machine.getsockopt, 3, socket.SOL_SOCKET, socket.SO_ERROR) == NOTIFY
    assert ask(machine, machine.socket, socket.AF_INET, socket.SOCK_STREAM) == ALLOW
    here = 0xFFFFFF9C  # AT_FDCWD
    assert ask(machine, machine.openat, here, 1, 0) == NOTIFY
    assert ask(machine, machine.openat, here, 1, 0o101) == ALLOW
    assert ask(machine, machine.openat, 5, 1, 0) == ALLOW


def test_open_is_allowed_where_all_may_open_the_device(machine: Architecture) -> None:
    program = seccomp.assemble(machine, seccomp.rules(machine, opens=False))
    call = SystemCall(machine.openat, (0xFFFFFF9C, 1, 0, 0, 0, 0), machine.architecture)
    assert run(program, call) == ALLOW
    assert seccomp.may_be_opened("/dev/null")
    for other in ("/dev", "/etc/passwd", "/dev/null/none"):
        assert not seccomp.may_be_opened(other)


def test_stat_and_access_are_allowed_without_the_option(machine: Architecture) -> None:
    here = 0xFFFFFF9C  # AT_FDCWD
    program = seccomp.assemble(machine, seccomp.rules(machine, True, looks=True))
    assert len(program) // 8 <= 4096
    looks = (machine.newfstatat, machine.statx, machine.faccessat, machine.faccessat2)
    for number in (*looks, machine.stat, machine.lstat, machine.access):
        if number >= 0:
            assert ask(machine, number, here, 1) == ALLOW
            call = SystemCall(number, (here, 1, 0, 0, 0, 0), machine.architecture)
            assert run(program, call) == NOTIFY
    for number in looks:  # relative to an open folder or file
        call = SystemCall(number, (5, 1, 0, 0x1000, 0, 0), machine.architecture)
        assert run(program, call) == ALLOW
