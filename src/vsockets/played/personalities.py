"""The facts about each VMM that a played machine has to imitate, as plain values.

``docs/test-your-agent.md`` has the source of each fact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from ..model.constants import VMADDR_CID_ANY, VMADDR_CID_HOST

#: The first port of a host's end in Firecracker's device and those derived from it.
FIRST_HOST_PORT = 1 << 30

#: CID of the parent instance of a Nitro enclave.
NITRO_PARENT_CID = 3


class Transport(Enum):
    """The form in which a VMM gives its host access to the guest's ports."""

    HYBRID = "hybrid"  #: a unix socket with a CONNECT line, and one unix socket for each host port
    KERNEL = "kernel"  #: the AF_VSOCK of the host's kernel


class Effect(Enum):
    """Effect of a restore or a snapshot on the guest's end of an established connection."""

    KEPT = "kept"
    RESET = "reset"  #: closed at once
    SILENT = "silent"  #: open, without data, until the guest sends its first byte: then reset


@dataclass(frozen=True)
class Personality:
    """A VMM of one version, as an agent's author sees it."""

    name: str
    version: str  #: the first version that behaves so
    transport: Transport
    guest_cid: int = 3  #: CID of the first guest unless another is given
    host_cid: int = VMADDR_CID_HOST  #: CID under which a guest reaches its host
    operations: frozenset[str] = frozenset({"kill", "reboot", "replace", "change-cid"})
    snapshot: Effect = Effect.KEPT  #: on the connections of the source, when it resumes
    restore: Effect = Effect.RESET
    #: False: a CONNECT line that arrives in pieces ends the connection
    joins_lines: bool = True
    #: False: the host's half-close ends both directions, and the guest's is not passed on
    half_close: bool = True
    #: False: the ports of host ends start again at FIRST_HOST_PORT after a restore
    remembers_ports: bool = True
    #: True: after a pause without a snapshot no byte of the host reaches the guest
    deaf_after_pause: bool = False
    #: False: the guest's clock goes on from the snapshot when it is restored
    advances_clock: bool = False
    vmclock: bool = False  #: a VMClock device reports restores to the guest's programs
    connections: int = 1023  #: largest number of connections of a hybrid device
    reported_cid: int | None = None  #: CID that the guest's kernel reports as its own, if another
    agent_port: int = 0  #: port of the VMM's own agent in the guest; 0: it has none
    scheme: str = ""  #: URL scheme in which the VMM names the agent's address


_RESTARTS = frozenset({"kill", "reboot", "replace", "change-cid"})
_LIFE = _RESTARTS | {"pause", "resume", "snapshot", "restore", "clone"}
_FIRECRACKER = Personality(
    *("firecracker", "1.17", Transport.HYBRID),
    operations=_LIFE - {"change-cid"},
    snapshot=Effect.RESET,
    joins_lines=False,
    half_close=False,
    vmclock=True,
)
_FIRECRACKER_1_10 = replace(_FIRECRACKER, version="1.10", remembers_ports=False, vmclock=False)
_CLOUD_HYPERVISOR = Personality(
    *("cloud-hypervisor", "53", Transport.HYBRID),
    operations=_LIFE,
    remembers_ports=False,
    advances_clock=True,
)
_CLOUD_HYPERVISOR_52 = replace(
    _CLOUD_HYPERVISOR, version="52", half_close=False, advances_clock=False
)
_CLOUD_HYPERVISOR_47 = replace(_CLOUD_HYPERVISOR_52, version="47", restore=Effect.SILENT)
_ALL = (
    _FIRECRACKER,
    replace(_FIRECRACKER, version="1.16", deaf_after_pause=True),
    replace(_FIRECRACKER, version="1.15"),
    _FIRECRACKER_1_10,
    replace(_FIRECRACKER_1_10, version="1.0", snapshot=Effect.SILENT, restore=Effect.SILENT),
    _CLOUD_HYPERVISOR,
    _CLOUD_HYPERVISOR_52,
    _CLOUD_HYPERVISOR_47,
    replace(_CLOUD_HYPERVISOR_47, version="41", joins_lines=False),
    replace(_CLOUD_HYPERVISOR, name="kata", version="3", agent_port=1024, scheme="hvsock"),
    Personality(
        *("qemu", "7.2", Transport.KERNEL),
        operations=_LIFE - {"pause", "resume"},
    ),
    Personality("nitro", "1.0", Transport.KERNEL, guest_cid=16, host_cid=NITRO_PARENT_CID),
    Personality("hyperv", "5.15", Transport.KERNEL, reported_cid=VMADDR_CID_ANY),
)

#: The names of the VMMs that can be played.
NAMES = tuple(dict.fromkeys(one.name for one in _ALL))


def find(name: str) -> Personality:
    """Return the personality called ``NAME`` or ``NAME@VERSION``.

    It is the newest one whose version is not above the given one; without a version the newest.

    Raises ValueError if the name or the version is unknown.
    """
    name, _, version = name.partition("@")
    candidates = [one for one in _ALL if one.name == name]
    if not candidates:
        raise ValueError(f"unknown hypervisor: {name!r} (expected {', '.join(NAMES)})")
    if not version:
        return candidates[0]
    try:
        wanted = _numbers(version)
    except ValueError:
        raise ValueError(f"invalid version: {version!r} (expected numbers and dots)") from None
    for one in candidates:
        if _numbers(one.version) <= wanted:
            return one
    oldest = candidates[-1].version
    raise ValueError(f"unknown version of {name}: {version} (expected {oldest} or later)")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.removeprefix("v").split(".")))
