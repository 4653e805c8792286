"""Programs that use a real vsockd, compared with the guide, driven at random.

The model is that of ``tests/fabric``: :mod:`by_the_guide`.  Here every socket is a real one in a
process of its own, data passes through it, and a crash is a SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from by_the_guide import (
    ANY,
    DATAGRAM,
    HOST,
    LOCAL,
    SEQPACKET,
    STREAM,
    Machine,
    Program,
    Socket,
    Stream,
    World,
)
from forms import choose
from vsockets import Attachment
from vsockets.testing import PrivateFabric, wait_until

from .puppet import Puppet
from .users import CAP_NET_ADMIN, NOBODY, as_root, has_capability

CONFIGURATION = f"""
[[grant]]
user = {NOBODY}
dgram_vsocket_trusted = true
domains = ["", "lab"]
"""

ROOT_PROGRAM = Program(0, net_admin=has_capability(CAP_NET_ADMIN), bind_service=True)
NOBODYS_PROGRAM = Program(NOBODY, granted=frozenset({DATAGRAM}), domains=frozenset({"", "lab"}))
PROGRAMS = (ROOT_PROGRAM, NOBODYS_PROGRAM)

CHANGES = ["suspend", "resume", "migrate", "reset", "ft-on", "ft-off", "power-off", "power-on"]

pytestmark = [
    as_root,
    pytest.mark.timeout(240),  # it is long, and longer on a busy machine
]

kinds = st.sampled_from([STREAM, SEQPACKET, DATAGRAM])
stream_kinds = st.sampled_from([STREAM, SEQPACKET])
programs = st.sampled_from(PROGRAMS)
cids = st.sampled_from([2, 3, 4, 0, 1, 99, 2, 3, 4, ANY])
ports = st.sampled_from([5000, 5001, 5001, 1023, 5000, ANY])
often_not = st.sampled_from([False, False, True])
isolations = st.one_of(
    st.sampled_from([("default", False, ""), ("restricted", False, "")]),
    st.tuples(st.just("legacy"), st.booleans(), st.sampled_from(["", "lab"])),
)


class Stage:
    """A fabric, and a process for each program."""

    def __init__(self, fabric: PrivateFabric) -> None:
        self.fabric = fabric
        self.puppets = {program: Puppet(program.user) for program in PROGRAMS}

    def attachment(self, machine: Machine) -> Attachment:
        return Attachment(self.fabric.folder / str(machine.cid))

    def restart(self, program: Program) -> None:
        self.puppets[program].kill()
        self.puppets[program] = Puppet(program.user)


@pytest.fixture
def stage() -> Iterator[Stage]:
    fabric = PrivateFabric()
    (fabric.configuration / "grants.toml").write_text(CONFIGURATION)
    with fabric:
        fabric.folder.parent.chmod(0o755)  # for the other user
        stage = Stage(fabric)
        try:
            yield stage
        finally:
            for puppet in stage.puppets.values():
                puppet.kill()


class Ends:
    """Both ends of a stream: the number of each socket in its program, None while the accepting
    one is pending.
    """

    def __init__(self, stream: Stream, connecting: int) -> None:
        self.connecting, self.accepting = stream.programs
        self.numbers: list[int | None] = [connecting, None]


class RealFabric(RuleBasedStateMachine):
    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.control = stage.fabric.control
        self.world = World(owner=0)
        self.numbers: dict[Socket, int] = {}
        self.ends: dict[Stream, Ends] = {}
        #: what each listener has not accepted yet, perhaps over by now
        self.waiting: dict[Socket, list[Stream]] = {}
        self.said = 0

    def teardown(self) -> None:
        for program in PROGRAMS:
            self.crash(program)
        for machine in list(self.world.machines.values()):
            if machine.is_guest:
                self.control.remove_context(machine.cid)
        wait_until(lambda: self.control.sockets() == [], "every socket to be forgotten")

    # Helpers of the rules

    def puppet(self, program: Program) -> Puppet:
        return self.stage.puppets[program]

    def agree(self, decided: int, expected: int) -> bool:
        """Check a verdict; return whether it is a permission."""
        assert errno.errorcode.get(decided, "yes") == errno.errorcode.get(expected, "yes")
        return decided == 0

    def ask_administrator(self, expected: int, what: Any, *arguments: Any, **named: Any) -> Any:
        """Return vsockd's reply to its administrator, None when it refuses as expected."""
        try:
            answer = what(*arguments, **named)
        except OSError as error:
            self.agree(error.errno or -1, expected)
            return None
        self.agree(0, expected)
        return answer

    def draw_home(self, data: st.DataObject, program: Program) -> Machine:
        """Draw a context for ``program``: the host, its user's guests, or any for root."""
        homes = [
            machine
            for machine in self.world.powered()
            if program.user in (0, machine.owner) or machine.cid == HOST
        ]
        return data.draw(st.sampled_from(homes), "home")

    def next_words(self) -> str:
        self.said += 1
        return f"words {self.said}"

    def accept(self, listener: Socket) -> None:
        stream = self.waiting[listener].pop(0)
        puppet = self.puppet(listener.program)
        number, peer = puppet.accept(self.numbers[listener])
        assert peer == stream.local
        if stream in self.ends:
            self.ends[stream].numbers[1] = number
            assert puppet.order("name", number) == list(stream.peer)
        else:  # it was over before
            self.assert_over(puppet, number)

    def assert_over(self, puppet: Puppet, number: int) -> None:
        """Check that a program sees the end of a stream; then it closes its socket."""
        with contextlib.suppress(ConnectionResetError):
            assert puppet.order("recv", number) == ""
        assert puppet.attempt("send", number, "x") in (errno.EPIPE, errno.ECONNRESET)
        puppet.order("close", number)

    def ended(self, stream: Stream, closed: Program | None = None) -> None:
        """Check that both programs see the end; ``closed`` has been killed."""
        ends = self.ends.pop(stream)
        for program, number in zip((ends.connecting, ends.accepting), ends.numbers, strict=True):
            if number is not None and program is not closed:
                self.assert_over(self.puppet(program), number)

    def drop_listener(self, listener: Socket, killed: Program | None = None) -> None:
        """Remove a listener and its pending connections."""
        for stream in self.waiting.pop(listener, []):
            if stream in self.ends:
                self.world.gone(stream)
                self.ended(stream, killed)

    def close_all_of(self, sockets: list[Socket]) -> None:
        """Close sockets of programs, some of which have ended with their context."""
        for socket in sockets:
            self.puppet(socket.program).order("close", self.numbers.pop(socket))
            self.drop_listener(socket)

    # Contexts

    @initialize(first=isolations, second=isolations)
    def begin(self, first: tuple[str, bool, str], second: tuple[str, bool, str]) -> None:
        for cid, isolation, owner in ((3, first, 0), (4, second, NOBODY)):
            self.add_context(cid, isolation, owner, 1000)
        for machine in self.world.powered():
            self.serve_in(machine, STREAM, ANY, 5000, ROOT_PROGRAM, True)
            self.serve_in(machine, DATAGRAM, ANY, 5000, ROOT_PROGRAM, False)

    @precondition(lambda self: len(self.world.machines) < 5)
    @rule(
        cid=st.integers(3, 5),
        isolation=isolations,
        owner=st.sampled_from([0, NOBODY]),
        most_sockets=st.sampled_from([2, 1000]),
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
        profile, unrestricted, domain = isolation
        named: dict[str, Any] = {"profile": profile, "limits": {"sockets": most_sockets}}
        if profile == "legacy":
            named |= {"unrestricted": unrestricted, "domain": domain}
        expected = errno.EEXIST if cid in self.world.machines else 0
        if reserved_ports:
            named["reserved_ports"] = True
            expected = self.world.may_grant_reserved_ports(owner) or expected
        add = self.control.add_context
        if self.ask_administrator(expected, add, cid, owner=owner, **named) is not None:
            self.world.add(Machine(cid, owner, *isolation, most_sockets, reserved_ports))

    @precondition(lambda self: len(self.world.machines) > 3)
    @rule(cid=st.sampled_from([3, 4, 5]))
    def remove_context(self, cid: int) -> None:
        machine = self.world.machines.get(cid)
        expected = 0
        if machine is None:
            expected = errno.ENOENT
        elif self.world.streams_of(machine):
            expected = errno.EBUSY
        self.ask_administrator(expected, self.control.remove_context, cid)
        if machine is not None and not expected:
            sockets = [one for one in self.world.sockets() if one.home is machine]
            self.world.remove(machine)
            self.close_all_of(sockets)

    @rule(data=st.data(), change=st.sampled_from(CHANGES))
    def change(self, data: st.DataObject, change: str) -> None:
        guests = [machine for machine in self.world.machines.values() if machine.is_guest]
        if not guests:
            return
        machine = data.draw(st.sampled_from(guests), "machine")
        sockets = [one for one in self.world.sockets() if one.home is machine]
        expected = self.world.may_change(machine, change)
        name, _, mode = change.partition("-")
        if name == "ft":
            request = partial(self.control.fault_tolerance, machine.cid, mode == "on")
        else:
            request = partial(getattr(self.control, change.replace("-", "_")), machine.cid)
        answer = self.ask_administrator(expected, request)
        if answer is None:
            return
        assert answer["streams_left"] == []
        for stream in self.world.changed(machine, change):
            self.ended(stream)
        if change == "power-off":
            self.close_all_of(sockets)

    # Programs

    @rule(program=programs)
    def crash(self, program: Program) -> None:
        self.stage.restart(program)
        for stream in self.world.streams():
            if program in stream.programs:
                self.world.gone(stream)
                self.ended(stream, program)
        for socket in self.world.sockets():
            if socket.program is program:
                self.world.gone(socket)
                del self.numbers[socket]
                self.waiting.pop(socket, None)

    @rule(data=st.data(), kind=kinds, cid=cids, port=ports, program=programs, local=often_not)
    def bind(
        self, data: st.DataObject, kind: str, cid: int, port: int, program: Program, local: bool
    ) -> None:
        home = self.draw_home(data, program)
        cid = data.draw(st.sampled_from([cid, home.cid, LOCAL if local else ANY]), "which cid")
        listens = data.draw(st.booleans(), "listens")
        self.serve_in(home, kind, cid, port, program, listens and kind != DATAGRAM)

    def serve_in(
        self, home: Machine, kind: str, cid: int, port: int, program: Program, listens: bool
    ) -> None:
        puppet = self.puppet(program)
        number = puppet.socket(self.stage.attachment(home), kind)
        expected = self.world.may_bind(home, kind, cid, port, program)
        if not self.agree(puppet.attempt("bind", number, cid, port), expected):
            puppet.order("close", number)
            return
        found = puppet.order("name", number)
        assert port == ANY or found[1] == port
        socket = self.world.bound(home, kind, cid, found[1], program)
        assert found == list(socket.address)
        self.numbers[socket] = number
        if listens:
            puppet.order("listen", number)
            socket.listening = True
            self.waiting[socket] = []

    @rule(
        data=st.data(),
        kind=stream_kinds,
        cid=cids,
        port=ports,
        program=programs,
        astray=often_not,
        from_bound=often_not,
    )
    def connect(
        self,
        data: st.DataObject,
        kind: str,
        cid: int,
        port: int,
        program: Program,
        astray: bool,
        from_bound: bool,
    ) -> None:
        home = self.draw_home(data, program)
        listeners = list(self.waiting)
        if listeners and not astray:
            target = data.draw(st.sampled_from(listeners), "target")
            kind, cid, port = target.kind, target.home.cid, target.port
        mine = [
            one
            for one in self.world.sockets()
            if (one.home, one.kind, one.program) == (home, kind, program) and not one.listening
        ]
        bound = data.draw(st.sampled_from(mine), "bound") if from_bound and mine else None
        puppet = self.puppet(program)
        number = (
            puppet.socket(self.stage.attachment(home), kind)
            if bound is None
            else self.numbers[bound]
        )
        expected, listener = self.world.may_connect(home, kind, cid, port, program, bound)
        if not self.agree(puppet.attempt("connect", number, cid, port), expected):
            if bound is None:
                puppet.order("close", number)
            return
        assert listener is not None
        own_port = puppet.order("name", number)[1]
        stream = self.world.connected(home, listener, own_port, program, bound)
        if bound is not None:
            del self.numbers[bound]
        assert puppet.order("name", number) == list(stream.local)
        assert puppet.order("peer", number) == list(stream.peer)
        self.ends[stream] = Ends(stream, number)
        self.waiting[listener].append(stream)
        if data.draw(st.booleans(), "accepted at once"):
            while self.waiting[listener]:
                self.accept(listener)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data())
    def accept_one(self, data: st.DataObject) -> None:
        waited_for = [listener for listener, streams in self.waiting.items() if streams]
        self.accept(data.draw(st.sampled_from(waited_for), "listener"))

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def talk(self, data: st.DataObject) -> None:
        """Exchange data in both directions, if the connection was accepted."""
        ends = self.ends[data.draw(st.sampled_from(list(self.ends)), "stream")]
        if ends.numbers[1] is None:
            return
        connecting, accepting = self.puppet(ends.connecting), self.puppet(ends.accepting)
        both = ((connecting, ends.numbers[0]), (accepting, ends.numbers[1]))
        for (speaker, mouth), (hearer, ear) in (both, both[::-1]):
            words = self.next_words()
            speaker.order("send", mouth, words)
            assert hearer.order("recv", ear) == words

    @rule(
        data=st.data(),
        cid=cids,
        port=ports,
        program=programs,
        astray=often_not,
        unbound=st.booleans(),
    )
    def send(
        self,
        data: st.DataObject,
        cid: int,
        port: int,
        program: Program,
        astray: bool,
        unbound: bool,
    ) -> None:
        home = self.draw_home(data, program)
        datagrams = [one for one in self.world.sockets() if one.kind == DATAGRAM]
        if datagrams and not astray:
            target = data.draw(st.sampled_from(datagrams), "target")
            cid, port = target.home.cid, target.port
        mine = [one for one in datagrams if (one.home, one.program) == (home, program)]
        source = data.draw(st.sampled_from(mine), "source") if mine and not unbound else None
        expected, receiver = self.world.may_send(home, cid, port, program, source)
        puppet = self.puppet(program)
        if source is None:
            number = puppet.socket(self.stage.attachment(home), DATAGRAM)
            expected = expected or self.world.may_bind(home, DATAGRAM, ANY, ANY, program)
        else:
            number = self.numbers[source]
        words = self.next_words()
        if not self.agree(puppet.attempt("sendto", number, words, cid, port), expected):
            if source is None:
                puppet.order("close", number)
            return
        if source is None:
            own_port = puppet.order("name", number)[1]
            source = self.world.bound(home, DATAGRAM, ANY, own_port, program)
            self.numbers[source] = number
        assert receiver is not None
        received = self.puppet(receiver.program).order("recvfrom", self.numbers[receiver])
        assert received == [words, list(source.address)]

    @precondition(lambda self: self.world.held)
    @rule(data=st.data(), the_accepting_one=st.booleans())
    def close(self, data: st.DataObject, the_accepting_one: bool) -> None:
        holder = data.draw(st.sampled_from(list(self.world.held.values())), "holder")
        self.world.gone(holder)
        if isinstance(holder, Socket):
            self.close_all_of([holder])
            return
        ends = self.ends[holder]
        side = int(the_accepting_one and ends.numbers[1] is not None)
        number, ends.numbers[side] = ends.numbers[side], None
        program = ends.accepting if side else ends.connecting
        self.puppet(program).order("close", number)
        self.ended(holder)

    # Invariants

    @invariant()
    def vsockd_tells_its_administrator_the_same(self) -> None:
        expected = sorted(self.rows(), key=str)

        def told() -> list[tuple[object, ...]]:
            keys = ("context", "type", "state", "cid", "port")
            rows = [
                (*(row[key] for key in keys), row["peer"] and tuple(row["peer"]))
                for row in self.control.sockets()
            ]
            return sorted(rows, key=str)

        wait_until(lambda: told() == expected, f"{told()} to become {expected}")
        assert {row["cid"]: (row["state"], row["ft"]) for row in self.control.contexts()} == {
            cid: (machine.state, machine.ft) for cid, machine in self.world.machines.items() if cid
        }

    def rows(self) -> Iterator[tuple[object, ...]]:
        for socket in self.world.sockets():
            state = "listening" if socket.listening else "bound"
            state = "unconnected" if socket.kind == DATAGRAM else state
            yield socket.home.cid, socket.kind, state, *socket.address, None
        for stream in self.world.streams():
            yield stream.home.cid, stream.kind, "established", *stream.local, stream.peer
            yield stream.peer_home.cid, stream.kind, "established", *stream.peer, stream.local


def test_a_real_fabric_agrees_with_the_guide(stage: Stage) -> None:
    run_state_machine_as_test(
        lambda: RealFabric(stage),  # type: ignore[arg-type]  # a function that makes one will do
        settings=settings(
            max_examples=choose(15, 40),
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
