"""The fabric's decisions compared with a model of the guide, driven at random.

:mod:`by_the_guide` has the model.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from by_the_guide import (
    ANY,
    DATAGRAM,
    LOCAL,
    SEQPACKET,
    STREAM,
    Holder,
    Machine,
    Program,
    Socket,
    World,
)
from vsockets.fabric import (
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    Change,
    Context,
    Credentials,
    Endpoint,
    EndpointKind,
    Fabric,
    Grant,
    Isolation,
    Limits,
    Profile,
    Refused,
    Settings,
)
from vsockets.fabric.policy import require_own_guest
from vsockets.model.buffers import BufferSizes

from .programs import StubProgram

FABRICS_OWNER, ALICE, BOB = 1000, 1001, 1002

STREAMS_TRUSTED = Grant(BOB, None, None, True, False, None)
DATAGRAMS_TRUSTED = Grant(BOB, None, None, False, True, None)
IN_THE_LAB = Grant(BOB, None, None, False, False, frozenset({"lab"}))

#: Configured grants, and the model's form of each.
SETTINGS = Settings(grants=(STREAMS_TRUSTED, DATAGRAMS_TRUSTED, IN_THE_LAB))
PROGRAMS = {
    Program(FABRICS_OWNER): StubProgram(),
    Program(0, bind_service=True): StubProgram(capabilities={CAP_NET_BIND_SERVICE}),
    Program(ALICE): StubProgram(),
    Program(BOB, net_admin=True): StubProgram(capabilities={CAP_NET_ADMIN}),
    Program(BOB, granted=frozenset({STREAM, SEQPACKET})): StubProgram(grants={STREAMS_TRUSTED}),
    Program(BOB, granted=frozenset({DATAGRAM})): StubProgram(grants={DATAGRAMS_TRUSTED}),
    Program(ALICE, domains=frozenset({"lab"})): StubProgram(grants={IN_THE_LAB}),
}

# Few of each, so that they interact.
guest_cids = st.integers(3, 6)
cids = st.sampled_from([0, 1, 2, 3, 4, 5, 3, 4, 99, ANY])
ports = st.sampled_from([0, 1023, 1024, 5000, 5000, 5000, 5001, ANY])
kinds = st.sampled_from([STREAM, SEQPACKET, DATAGRAM])
programs = st.sampled_from(list(PROGRAMS))
buffer_sizes = st.sampled_from(
    [*[BufferSizes()] * 4, BufferSizes(1024, 128, 2048), BufferSizes(65_536, 4096, 262_144)]
)
often, often_not = st.sampled_from([True, True, False]), st.sampled_from([False, False, True])
changes = st.sampled_from([change.value for change in Change])
isolations = st.one_of(
    st.sampled_from([("default", False, ""), ("restricted", False, "")]),
    st.tuples(st.just("legacy"), st.booleans(), st.sampled_from(["", "lab"])),
)


def somebody(program: Program) -> StubProgram:
    known = PROGRAMS[program]
    credentials = Credentials(100, program.user, program.user)
    return StubProgram(credentials, known.capabilities, known.grants)


class FabricModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(FABRICS_OWNER)
        self.fabric = Fabric(FABRICS_OWNER)
        self.fabric.settings = SETTINGS
        #: the fabric's object for each of the model
        self.real: dict[Holder, Any] = {}

    def decide(self, expected: int, action: Callable[[], object]) -> bool:
        """Check that the fabric decides as expected; return whether the request was granted."""
        decided, reason = 0, "not refused"
        try:
            action()
        except Refused as refused:
            decided, reason = refused.errno, refused.reason
        assert errno.errorcode.get(decided) == errno.errorcode.get(expected), reason
        return decided == 0

    def context(self, machine: Machine) -> Context:
        context = self.fabric.contexts.get(machine.cid)
        assert context is not None
        return context

    def connectable(self) -> list[Socket]:
        return [one for one in self.world.sockets() if one.kind != DATAGRAM]

    def listeners(self) -> list[Socket]:
        return [one for one in self.world.sockets() if one.listening]

    def draw_home(self, data: st.DataObject) -> Machine:
        """Draw a context, mostly a running one."""
        powered = self.world.powered()
        running = [machine for machine in powered if machine.state == "running"]
        return data.draw(st.sampled_from([*powered, *running, *running]), "home")

    def release(self, holder: Holder) -> None:
        real = self.real.pop(holder)
        if isinstance(real, Endpoint):
            self.fabric.unbind(real)
        else:
            self.fabric.end(real.number)

    def forget_what_has_gone(self) -> None:
        """Release the sockets closed by programs or with their context, as vsockd does."""
        held = set(self.world.held.values())
        for holder in [holder for holder in self.real if holder not in held]:
            self.release(holder)

    # Contexts

    @initialize(first=isolations, second=isolations)
    def begin(self, first: tuple[str, bool, str], second: tuple[str, bool, str]) -> None:
        for cid, isolation, most_sockets in ((3, first, 1000), (4, second, 5)):
            self.add_context(cid, isolation, ALICE, most_sockets)
        for machine in self.world.powered():
            for kind, cid, port in (
                (STREAM, ANY, 5000),
                (DATAGRAM, ANY, 5000),
                (DATAGRAM, LOCAL, 5001),
            ):
                socket = self.bind_in(machine, kind, cid, port, Program(FABRICS_OWNER))
                if socket is not None and kind == STREAM:
                    self.listen_on(socket, BufferSizes())

    @precondition(lambda self: len(self.world.machines) < 5)
    @rule(
        cid=guest_cids,
        isolation=isolations,
        owner=st.sampled_from([FABRICS_OWNER, ALICE]),
        most_sockets=st.sampled_from([2, 1000, 1000]),
        reserved_ports=often_not,
    )
    def add_context(
        self,
        cid: int,
        isolation: tuple[str, bool, str],
        owner: int,
        most_sockets: int,
        reserved_ports: bool = False,
    ) -> None:
        if reserved_ports:
            expected = self.world.may_grant_reserved_ports(owner)
            if not self.decide(expected, lambda: require_own_guest(owner, FABRICS_OWNER)):
                return
        expected = errno.EEXIST if cid in self.world.machines else 0
        if self.decide(expected, lambda: self.fabric.contexts.add(cid, "", owner)):
            machine = Machine(cid, owner, *isolation, most_sockets, reserved_ports)
            self.world.add(machine)
            context = self.context(machine)
            context.reserved_ports = reserved_ports
            profile, unrestricted, domain = isolation
            context.isolation = Isolation(Profile(profile), unrestricted, domain)
            context.set_limits(Limits(sockets=most_sockets))

    @precondition(lambda self: len(self.world.machines) > 3)
    @rule(cid=st.sampled_from([0, 2, 3, 4, 5, 6]))
    def remove_context(self, cid: int) -> None:
        machine = self.world.machines.get(cid)
        expected = 0 if cid > 2 else errno.EINVAL
        if machine is None:
            expected = errno.ENOENT
        if self.decide(expected, lambda: self.fabric.contexts.remove(cid)):
            assert machine is not None
            self.world.remove(machine)
            self.forget_what_has_gone()

    @rule(data=st.data(), change=changes, possible=often, kept=often)
    def change(self, data: st.DataObject, change: str, possible: bool, kept: bool) -> None:
        machine = data.draw(st.sampled_from(list(self.world.machines.values())), "machine")
        if possible and machine.is_guest:
            choices = [each.value for each in Change]
            choices = [each for each in choices if not self.world.may_change(machine, each)]
            if kept and len(choices) > 1:  # else most would be off most of the time
                choices.remove("power-off")
            change = data.draw(st.sampled_from(choices), "change")
        over: list[Any] = []

        def action() -> None:
            over.extend(self.fabric.change(self.context(machine), Change(change)))

        if self.decide(self.world.may_change(machine, change), action):
            ended = [self.real.pop(stream) for stream in self.world.changed(machine, change)]
            assert over == ended
            self.forget_what_has_gone()

    # Sockets

    @rule(data=st.data(), kind=kinds, cid=cids, port=ports, program=programs)
    def bind(self, data: st.DataObject, kind: str, cid: int, port: int, program: Program) -> None:
        """Bind to any address, mostly an invalid one."""
        self.bind_in(self.draw_home(data), kind, cid, port, program)

    @rule(
        data=st.data(),
        kind=kinds,
        local=often_not,
        port=st.sampled_from([1024, 5000, 5001, ANY]),
        program=programs,
        listens=st.sampled_from([None, BufferSizes(), BufferSizes(), BufferSizes(1024, 128, 2048)]),
    )
    def serve(
        self,
        data: st.DataObject,
        kind: str,
        local: bool,
        port: int,
        program: Program,
        listens: BufferSizes | None,
    ) -> None:
        """Bind to one of a context's own addresses, and maybe listen."""
        socket = self.bind_in(self.draw_home(data), kind, LOCAL if local else ANY, port, program)
        if socket is not None and kind != DATAGRAM and listens is not None:
            self.listen_on(socket, listens)

    def bind_in(
        self, home: Machine, kind: str, cid: int, port: int, program: Program
    ) -> Socket | None:
        made: list[Endpoint] = []

        def action() -> None:
            who = somebody(program)
            made.append(self.fabric.bind(self.context(home), EndpointKind(kind), cid, port, who))

        if not self.decide(self.world.may_bind(home, kind, cid, port, program), action):
            return None
        (real,) = made
        assert real.port == port or (port == ANY and 1024 <= real.port < ANY)
        socket = self.world.bound(home, kind, cid, real.port, program)
        assert real.address == socket.address
        self.real[socket] = real
        return socket

    def listen_on(self, socket: Socket, sizes: BufferSizes) -> None:
        self.fabric.listen(self.real[socket], sizes)
        socket.listening, socket.sizes = True, sizes

    @precondition(lambda self: self.connectable())
    @rule(data=st.data(), sizes=buffer_sizes)
    def listen(self, data: st.DataObject, sizes: BufferSizes) -> None:
        self.listen_on(data.draw(st.sampled_from(self.connectable()), "socket"), sizes)

    @precondition(lambda self: self.world.held)
    @rule(data=st.data(), twice=st.booleans())
    def close(self, data: st.DataObject, twice: bool) -> None:
        holder = data.draw(st.sampled_from(list(self.world.held.values())), "holder")
        real = self.real[holder]
        self.world.gone(holder)
        self.release(holder)
        if twice:  # late, and harmless
            self.real[holder] = real
            self.release(holder)

    @rule(program=programs)
    def crash(self, program: Program) -> None:
        """Close every socket of a program."""
        for holder in list(self.world.held.values()):
            if program in holder.programs:
                self.world.gone(holder)
        self.forget_what_has_gone()

    @rule(
        data=st.data(),
        kind=st.sampled_from([STREAM, SEQPACKET]),
        cid=cids,
        port=ports,
        program=programs,
    )
    def connect(
        self, data: st.DataObject, kind: str, cid: int, port: int, program: Program
    ) -> None:
        """Connect to any address, mostly an invalid one."""
        self.connect_from(self.draw_home(data), kind, cid, port, program, None, BufferSizes())

    @precondition(lambda self: self.listeners())
    @rule(data=st.data(), sizes=buffer_sizes, program=programs, from_bound=often_not)
    def connect_to_a_listener(
        self, data: st.DataObject, sizes: BufferSizes, program: Program, from_bound: bool
    ) -> None:
        home = self.draw_home(data)
        target = data.draw(st.sampled_from(self.listeners()), "target")
        bound = None
        mine = [one for one in self.connectable() if (one.home, one.kind) == (home, target.kind)]
        mine = [one for one in mine if not one.listening]
        if from_bound and mine:
            bound = data.draw(st.sampled_from(mine), "bound")
        cid = target.home.cid
        self.connect_from(home, target.kind, cid, target.port, program, bound, sizes)

    def connect_from(
        self,
        home: Machine,
        kind: str,
        cid: int,
        port: int,
        program: Program,
        bound: Socket | None,
        sizes: BufferSizes,
    ) -> None:
        expected, found = self.world.may_connect(home, kind, cid, port, program, bound, sizes)
        made = []

        def action() -> None:
            context, who = self.context(home), somebody(program)
            own = None if bound is None else self.real[bound]
            listener = self.fabric.find_listener(context, EndpointKind(kind), cid, port, who, own)
            made.append(self.fabric.connect(context, listener, own, sizes, who.credentials))

        if self.decide(expected, action):
            (real,) = made
            assert found is not None
            assert real.listener is self.real[found]
            assert bound is not None or real.local[1] >= 1024
            stream = self.world.connected(home, found, real.local[1], program, bound)
            assert (real.local, real.peer) == (stream.local, stream.peer)
            if bound is not None:
                del self.real[bound]
            self.real[stream] = real

    @rule(data=st.data(), cid=cids, port=ports, program=programs, right=often)
    def send(self, data: st.DataObject, cid: int, port: int, program: Program, right: bool) -> None:
        home = self.draw_home(data)
        datagrams = [one for one in self.world.sockets() if one.kind == DATAGRAM]
        if right and datagrams:
            target = data.draw(st.sampled_from(datagrams), "target")
            cid, port = target.home.cid, target.port
        mine = [one for one in datagrams if one.home is home]
        source = data.draw(st.sampled_from([None, *mine]), "source")
        expected, found = self.world.may_send(home, cid, port, program, source)

        def action() -> None:
            own = None if source is None else self.real[source]
            who = somebody(program)
            receiver = self.fabric.find_datagram(self.context(home), cid, port, who, own)
            assert isinstance(found, Socket)
            assert receiver is self.real[found]

        self.decide(expected, action)

    # Invariants

    @invariant()
    def the_same_contexts_are_in_the_same_state(self) -> None:
        assert {
            context.cid: (context.state.value, context.fault_tolerant)
            for context in self.fabric.contexts
        } == {cid: (machine.state, machine.ft) for cid, machine in self.world.machines.items()}

    @invariant()
    def the_same_ports_are_held_by_the_same(self) -> None:
        found = {
            (context.cid, name, port): holder
            for context in self.fabric.contexts
            for name, ports in (("connected", context.connected), ("dgram", context.datagrams))
            for port, holder in ports.items()
        }
        assert found == {key: self.real[holder] for key, holder in self.world.held.items()}

    @invariant()
    def every_stream_is_counted_once(self) -> None:
        streams = [self.real[stream] for stream in self.world.streams()]
        assert self.fabric.connections == {real.number: real for real in streams}

    @invariant()
    def every_port_is_counted_as_somebodys(self) -> None:
        for machine in self.world.machines.values():
            context = self.context(machine)
            assert sum(party.sockets for party in context.parties()) == context.sockets

    @invariant()
    def nothing_of_a_context_that_is_off_is_left(self) -> None:
        for machine in self.world.machines.values():
            if machine.state == "off":
                assert self.context(machine).sockets == 0


FabricModel.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestFabric = FabricModel.TestCase
