"""A model of the guide to compare the product with, as short as possible.

It is written from the sentences of the guide that it quotes (page numbers are the guide's) and,
where the guide is silent, from ``vsock(7)``; not from the code it is compared with.  It has no
names, no time limits and no data.  Verdicts are errnos; 0 means allowed.

``tests/fabric/test_fabric_model.py`` compares it with the fabric's decisions,
``tests/daemon/test_fabric_by_the_guide.py`` with programs that use a real vsockd, and
``tests/simulation`` with what a simulated vsockd lets happen.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field

from vsockets.model.buffers import BufferSizes, negotiate

ANY = 2**32 - 1
HYPERVISOR, LOCAL, HOST = 0, 1, 2
STREAM, SEQPACKET, DATAGRAM = "stream", "seqpacket", "dgram"

ABSENT = errno.EHOSTUNREACH

#: The changes of a machine that end its connections: "... lose connection after suspend and
#: resume", "do not survive live migration", "are dropped when a virtual machine is put into fault
#: tolerance (FT) mode" (page 7).  Reset is added.
ENDING = ("suspend", "migrate", "reset", "ft-on", "power-off")


@dataclass(frozen=True)
class Program:
    """A process and its rights."""

    user: int
    net_admin: bool = False  #: CAP_NET_ADMIN
    bind_service: bool = False  #: CAP_NET_BIND_SERVICE
    granted: frozenset[str] = frozenset()  #: the socket types it is trusted with, by configuration
    domains: frozenset[str] = frozenset({""})


@dataclass(eq=False)
class Machine:
    """A virtual machine, the host, or the hypervisor."""

    cid: int
    owner: int
    profile: str = "default"
    unrestricted: bool = False
    domain: str = ""
    most_sockets: int | None = None
    reserved_ports: bool = False  #: the fabric's owner lets every program of it have them
    state: str = "running"
    ft: bool = False

    @property
    def is_guest(self) -> bool:
        return self.cid > HOST


@dataclass(eq=False)
class Socket:
    """A bound socket, possibly listening."""

    home: Machine
    kind: str
    cid: int
    port: int
    program: Program
    listening: bool = False
    sizes: BufferSizes = field(default_factory=BufferSizes)

    @property
    def address(self) -> tuple[int, int]:
        return self.cid, self.port

    @property
    def programs(self) -> tuple[Program, ...]:
        return (self.program,)

    def is_for(self, machine: Machine) -> bool:
        """Return whether it is reachable: VMADDR_CID_LOCAL is "for local communication"."""
        return self.cid != LOCAL or machine is self.home


@dataclass(eq=False)
class Stream:
    """An established connection; it holds its connecting side's port."""

    home: Machine
    kind: str
    local: tuple[int, int]
    peer_home: Machine
    peer: tuple[int, int]
    programs: tuple[Program, ...]

    @property
    def port(self) -> int:
        return self.local[1]


Holder = Socket | Stream


class World:
    """All contexts and sockets.  ``may_...`` return verdicts; other methods record operations."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.machines = {cid: Machine(cid, owner) for cid in (HYPERVISOR, HOST)}
        self.held: dict[tuple[int, str, int], Holder] = {}

    def sockets(self) -> list[Socket]:
        return [holder for holder in self.held.values() if isinstance(holder, Socket)]

    def streams(self) -> list[Stream]:
        return [holder for holder in self.held.values() if isinstance(holder, Stream)]

    def powered(self) -> list[Machine]:
        """Return the machines that programs can run in."""
        return [machine for machine in self.machines.values() if machine.state != "off"]

    # Chapter 5, "Isolation of Virtual Machines"

    @staticmethod
    def sees(here: Machine, there: Machine) -> bool:
        """Return whether two machines may communicate at all."""
        # "You could also use vSockets for interprocess communications on a guest" (page 8).
        if here is there:
            return True
        # "As of the ESXi 5.1 release, only host to guest vSockets are allowed" (page 8).  "This
        # allows use of VMware Tools without any problems even for an isolated virtual machine."
        if not (here.is_guest and there.is_guest):
            return True
        # "A virtual machine could communicate with [...] other virtual machines with
        # vmci0.unrestricted set TRUE", "in the same domain" (ESX 4.0 to 5.0).
        both_legacy = here.profile == there.profile == "legacy"
        return (
            both_legacy and here.unrestricted and there.unrestricted and here.domain == there.domain
        )

    # Chapter 5, "Trusted vSockets"

    @staticmethod
    def trusts(guest: Machine, program: Program, kind: str) -> bool:
        """Return whether the host's endpoint of ``program`` is trusted for ``guest``."""
        return (
            program.net_admin  # "A process with the capability CAP_NET_ADMIN"
            or kind in program.granted  # "dgram_vsocket_trusted or stream_vsocket_trusted"
            or program.user == guest.owner  # "the same user ID as the virtual machine"
        )

    def meets(self, guest: Machine, program: Program, kind: str) -> bool:
        """Return whether ``guest`` and the host's ``program`` may communicate."""
        if guest.profile == "default":
            return True
        if guest.profile == "restricted":
            # "... trusted vSockets, which may be used for communication with isolated guest
            # virtual machines."
            return self.trusts(guest, program, kind)
        # "... could communicate only with the hypervisor and other virtual machines in the same
        # domain", and with "all host endpoints" when unrestricted.
        return guest.domain in program.domains and (
            guest.unrestricted or self.trusts(guest, program, kind)
        )

    # Verdicts

    def may_grant_reserved_ports(self, owner: int) -> int:
        """Return the verdict on reserved ports for a guest of user ``owner``."""
        return 0 if owner == self.owner else errno.EPERM

    def may_bind(self, home: Machine, kind: str, cid: int, port: int, program: Program) -> int:
        if cid not in (ANY, LOCAL, home.cid):
            return errno.EADDRNOTAVAIL  # "The source (context ID) may not be spoofed."
        if not self._may_serve(home, program):
            return errno.EACCES
        if not self._has_room(home):
            return errno.ENOBUFS
        # "must have capability CAP_NET_BIND_SERVICE"; the guest's exemption is this product's.
        if port < 1024 and not (program.bind_service or home.reserved_ports):
            return errno.EACCES
        if (home.cid, _space(kind), port) in self.held:
            return errno.EADDRINUSE
        return 0

    def may_connect(
        self,
        home: Machine,
        kind: str,
        cid: int,
        port: int,
        program: Program,
        bound: Socket | None = None,
        sizes: BufferSizes | None = None,
    ) -> tuple[int, Socket | None]:
        """Return the verdict, and the listener if it is 0."""
        verdict, there = self.way(home, cid, port, connecting=True)
        if there is None:
            return verdict, None
        target = self.held.get((there.cid, "connected", port))
        if (
            not isinstance(target, Socket)
            or not target.listening
            or target.kind != kind
            or not target.is_for(home)
        ):
            return errno.ECONNRESET, None
        if verdict := self._isolation(home, target, program, bound, errno.ECONNRESET):
            return verdict, None
        if negotiate(sizes or BufferSizes(), target.sizes) is None:
            return errno.EINVAL, None
        if bound is not None:
            return (0, target) if bound.is_for(there) else (ABSENT, None)
        if not self._may_serve(home, program):
            return errno.EACCES, None
        return (0, target) if self._has_room(home) else (errno.ENOBUFS, None)

    def may_send(
        self, home: Machine, cid: int, port: int, program: Program, source: Socket | None = None
    ) -> tuple[int, Socket | None]:
        """Return the verdict on a datagram, and the receiver if it is 0."""
        verdict, there = self.way(home, cid, port, connecting=False)
        if there is None:
            return verdict, None
        target = self.held.get((there.cid, DATAGRAM, port))
        if not isinstance(target, Socket) or not target.is_for(home):
            return errno.ECONNREFUSED, None
        if source is not None and not source.is_for(there):
            return ABSENT, None
        if verdict := self._isolation(home, target, program, source, errno.ECONNREFUSED):
            return verdict, None
        return 0, target

    def way(
        self, home: Machine, cid: int, port: int, connecting: bool
    ) -> tuple[int, Machine | None]:
        """Return the verdict on reaching a context, and its machine if it is 0."""
        # As Linux (tests/af_vsock.txt, and vsock_dgram_sendmsg): a stream to any CID has no
        # transport, a datagram to it stays at home; no datagram goes to any port.
        if connecting and cid == ANY:
            return errno.ENODEV, None
        if not connecting and port == ANY:
            return errno.EINVAL, None
        there = self.machines.get(home.cid if cid in (LOCAL, ANY) else cid)
        # "Communicating guest virtual machines must be running, not powered off" (page 7).  A
        # guest that is not visible answers as one that does not exist.
        if there is None or there.state == "off" or not self.sees(home, there):
            return ABSENT, None
        # A suspended machine does nothing, and "no new vSockets connections can be established
        # while a virtual machine is in FT mode" (page 7).
        if home.state != "running":
            return errno.ENETDOWN, None
        if there.state != "running":
            return ABSENT, None
        if connecting and (home.ft or there.ft):
            return (errno.ENETDOWN if home.ft else ABSENT), None
        return 0, there

    def _isolation(
        self, home: Machine, target: Socket, program: Program, own: Socket | None, absent: int
    ) -> int:
        there = target.home
        if home.is_guest and there.cid == HOST:
            # As without a listener: a guest does not learn what the host has.
            return 0 if self.meets(home, target.program, target.kind) else absent
        if home.cid == HOST and there.is_guest:
            mine = program if own is None else own.program
            return 0 if self.meets(there, mine, target.kind) else errno.EACCES
        return 0

    def _may_serve(self, home: Machine, program: Program) -> bool:
        # "The VMCI facility implicitly authenticates any hypervisor service as being part of the
        # trusted code base."
        return home.cid != HYPERVISOR or program.user in (self.owner, 0)

    def _has_room(self, home: Machine) -> bool:
        number = sum(cid == home.cid for cid, _, _ in self.held)
        return home.most_sockets is None or number < home.most_sockets

    # What was done

    def bound(self, home: Machine, kind: str, cid: int, port: int, program: Program) -> Socket:
        made = Socket(home, kind, LOCAL if cid == LOCAL else home.cid, port, program)
        self._hold(home, kind, port, made)
        return made

    def connected(
        self, home: Machine, target: Socket, port: int, program: Program, bound: Socket | None
    ) -> Stream:
        local = (home.cid, port)
        if bound is not None:
            local = bound.address
            self.gone(bound)
        peer = (target.home.cid, target.port)
        programs = (program, target.program)
        made = Stream(home, target.kind, local, target.home, peer, programs)
        self._hold(home, target.kind, local[1], made)
        return made

    def gone(self, holder: Holder) -> None:
        """Remove a socket that was closed, also by killing its program."""
        key = holder.home.cid, _space(holder.kind), holder.port
        assert self.held.pop(key) is holder

    def add(self, machine: Machine) -> None:
        self.machines[machine.cid] = machine

    def remove(self, machine: Machine) -> None:
        self._gone_with(machine)
        del self.machines[machine.cid]

    def _hold(self, home: Machine, kind: str, port: int, holder: Holder) -> None:
        key = home.cid, _space(kind), port
        assert key not in self.held, f"{holder} has the address of {self.held[key]}"
        self.held[key] = holder

    # "Persistence of Sockets" (page 7)

    def may_change(self, machine: Machine, change: str) -> int:
        possible = {
            "suspend": machine.state == "running",
            "resume": machine.state == "suspended",
            "migrate": machine.state == "running",
            "reset": machine.state != "off",
            "ft-on": machine.state == "running" and not machine.ft,
            "ft-off": machine.state == "running" and machine.ft,
            "power-off": machine.state != "off",
            "power-on": machine.state == "off",
        }
        return 0 if machine.is_guest and possible[change] else errno.EINVAL

    def changed(self, machine: Machine, change: str) -> list[Stream]:
        """Apply a change; return the connections that it ends."""
        over = []
        if change in ENDING:
            over = self.streams_of(machine)
            for stream in over:
                self.gone(stream)
        if change in ("ft-on", "ft-off"):
            machine.ft = change == "ft-on"
        if change == "power-off":
            machine.ft = False
            self._gone_with(machine)
        after = {"suspend": "suspended", "power-off": "off"}
        if change in ("suspend", "resume", "power-off", "power-on"):
            machine.state = after.get(change, "running")
        return over

    def streams_of(self, machine: Machine) -> list[Stream]:
        return [one for one in self.streams() if machine in (one.home, one.peer_home)]

    def _gone_with(self, machine: Machine) -> None:
        self._all_gone(self.streams_of(machine))
        self._all_gone([one for one in self.sockets() if one.home is machine])

    def _all_gone(self, holders: Iterable[Holder]) -> None:
        for holder in holders:
            self.gone(holder)


def _space(kind: str) -> str:
    """Return the port namespace: streams and packets share one, datagrams have their own."""
    return DATAGRAM if kind == DATAGRAM else "connected"
