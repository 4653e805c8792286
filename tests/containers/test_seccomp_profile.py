"""``vsock doctor --seccomp-profile``: a runtime's default profile, and what vsock run needs."""

from __future__ import annotations

import itertools
import platform
import struct
from collections.abc import Iterator, Sequence

import pytest

from vsockets.cli.seccomp_profile import NEEDED, Runtime, load_facts, make_profile
from vsockets.model.constants import AF_VSOCK
from vsockets.supervisor.arch import this_architecture

from .runtime import DEFAULT_CAPABILITIES, compile_filters

ALLOW, ERRNO = 0x7FFF_0000, 0x0005_0000
MACHINE = this_architecture()
CAPABILITIES = [(), DEFAULT_CAPABILITIES, (*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN")]
#: Flags of clone(), and personalities.
ARGUMENTS = [0, 8, 9, 0x2_0000, 0x2_0008, 0xFFFF_FFFF, 0x2_0000 | 17, 0x7E02_0000]


def answer(program: bytes, number: int, argument: int) -> int:
    """Return what the kernel's BPF machine would: libseccomp uses a few instructions more."""
    data = struct.pack("=iIQ6Q", number, MACHINE.architecture, 0, argument, 0, 0, 0, 0, 0)
    instructions = list(struct.iter_unpack("=HBBI", program))
    value, at = 0, 0
    while True:
        code, if_so, if_not, constant = instructions[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif code == 0x54:
            value &= constant
        elif code == 0x05:
            at += constant
        elif code == 0x06:
            return int(constant)
        else:
            holds = {0x15: value == constant, 0x25: value > constant, 0x35: value >= constant}
            at += if_so if holds[code] else if_not


def answers(profile: dict[str, object], capabilities: Sequence[str]) -> Iterator[int]:
    """Yield the answer to each call, with each of the arguments, as of several filters."""
    programs = [one.export() for one in compile_filters(profile, capabilities)]
    for number, argument in CALLS:
        yield min(answer(program, number, argument) for program in programs)


OTHERS = {"x86_64": (56, 135), "aarch64": (220, 92)}[platform.machine()]  # clone, personality
CALLS = [
    *((number, 0) for number in range(470)),
    *((MACHINE.socket, family) for family in range(46)),
    *itertools.product(OTHERS, ARGUMENTS),
]


@pytest.mark.parametrize("runtime", list(Runtime))
def test_without_the_needed_calls_it_is_the_default_profile(runtime: Runtime) -> None:
    """But for the error of a refused family with podman, whose profile needs two filters."""
    for capabilities in (
        CAPABILITIES if runtime is not Runtime.KUBERNETES else [DEFAULT_CAPABILITIES]
    ):
        default = answers(load_facts(runtime), capabilities)
        made = answers(make_profile(runtime, ()), capabilities)
        for (number, argument), expected, answered in zip(CALLS, default, made, strict=True):
            if runtime is Runtime.PODMAN and number == MACHINE.socket and expected != ALLOW:
                assert answered != ALLOW
            else:
                assert answered == expected, (number, argument, capabilities)


@pytest.mark.parametrize("runtime", list(Runtime))
def test_it_adds_the_needed_calls_alone(runtime: Runtime) -> None:
    default, made = make_profile(runtime, ()), make_profile(runtime)
    added = set(made["syscalls"][0]["names"]) - set(default["syscalls"][0]["names"])
    assert added == set(NEEDED) - set(load_facts(runtime)["allow"].split())
    assert added == (set() if runtime is Runtime.PODMAN else {"pidfd_getfd"})
    made["syscalls"][0] = default["syscalls"][0]
    assert made == default


@pytest.mark.parametrize("runtime", list(Runtime))
def test_no_profile_allows_af_vsock(runtime: Runtime) -> None:
    (made,) = compile_filters(make_profile(runtime), DEFAULT_CAPABILITIES)
    refusal = answer(made.export(), MACHINE.socket, AF_VSOCK)
    assert refusal & 0xFFFF_0000 == ERRNO
