"""The fabric against a small model of it, driven at random.

The model says in a few lines what the guide says: who may bind what, who reaches whom, and
which ports are held.  The fabric must decide the same, whatever came before.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vsockets.buffers import BufferSizes, negotiate
from vsockets.fabric import Connection, Context, Endpoint, Fabric, Kind, Refused

from .somebody import ME, SERVICE

ANY = 2**32 - 1
LOCAL = 1

# Few of each, so that they meet.
guest_cids = st.integers(3, 6)
cids = st.sampled_from([0, 1, 2, 3, 4, 5, 6, ANY])
ports = st.sampled_from([0, 1023, 1024, 5000, 5001, ANY])
kinds = st.sampled_from(Kind)
stream_kinds = st.sampled_from([Kind.STREAM, Kind.SEQPACKET])
buffer_sizes = st.sampled_from(
    [BufferSizes(), BufferSizes(1024, 128, 2048), BufferSizes(65_536, 4096, 262_144)]
)


@dataclass(eq=False)
class Socket:
    """A bound socket, as the model knows it, and the fabric's endpoint for it."""

    real: Endpoint
    kind: Kind
    home: int  #: the CID of its context
    local_only: bool
    port: int
    listening: bool = False
    sizes: BufferSizes = field(default_factory=BufferSizes)

    @property
    def address(self) -> tuple[int, int]:
        return (LOCAL if self.local_only else self.home), self.port


@dataclass(eq=False)
class Stream:
    """A connection: it holds its connecting side's port."""

    real: Connection
    home: int
    peer_home: int
    port: int


def space(kind: Kind) -> str:
    return "dgram" if kind is Kind.DATAGRAM else "connected"


class FabricModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fabric = Fabric(owner=1000)
        self.homes = {0, 2}
        #: who holds what: (CID of the context, name space, port)
        self.held: dict[tuple[int, str, int], Socket | Stream] = {}

    # What the model knows

    def sockets(self) -> list[Socket]:
        return [holder for holder in self.held.values() if isinstance(holder, Socket)]

    def streams(self) -> list[Stream]:
        return [holder for holder in self.held.values() if isinstance(holder, Stream)]

    def context(self, cid: int) -> Context:
        context = self.fabric.contexts.get(cid)
        assert context is not None
        return context

    def verdict_on_path(self, home: int, cid: int, port: int) -> tuple[int, int]:
        """``(errno, CID of the destination's context)`` for a way from ``home``."""
        if ANY in (cid, port):
            return errno.EINVAL, -1
        destination = home if cid == LOCAL else cid
        both_guests = home > 2 and destination > 2 and home != destination
        if destination not in self.homes or both_guests:
            return errno.EHOSTUNREACH, -1
        return 0, destination

    def decide(self, expected: int, action: Callable[[], object]) -> bool:
        """Check that the fabric decides as expected; returns whether it did as asked."""
        decided, rule = 0, "not refused"
        try:
            action()
        except Refused as refused:
            decided, rule = refused.errno, refused.reason
        assert errno.errorcode.get(decided) == errno.errorcode.get(expected), rule
        return decided == 0

    # What happens

    @rule(cid=guest_cids)
    def add_context(self, cid: int) -> None:
        expected = errno.EEXIST if cid in self.homes else 0
        self.decide(expected, lambda: self.fabric.contexts.add(cid, "", 0))
        self.homes.add(cid)

    @rule()
    def lease_context(self) -> None:
        cid = self.fabric.contexts.add(None, "", 0).cid
        assert cid >= 3
        assert cid not in self.homes
        self.homes.add(cid)

    @rule(data=st.data())
    def remove_context(self, data: st.DataObject) -> None:
        cid = data.draw(st.sampled_from(sorted(self.homes | {3})), "cid")
        expected = 0 if cid > 2 else errno.EINVAL
        if cid not in self.homes:
            expected = errno.ENOENT
        if not self.decide(expected, lambda: self.fabric.contexts.remove(cid)):
            return
        for stream in self.streams():
            if cid in (stream.home, stream.peer_home):
                self.fabric.end(stream.real.number)
                del self.held[stream.home, "connected", stream.port]
        for socket in self.sockets():
            if socket.home == cid:
                self.fabric.unbind(socket.real)
                del self.held[cid, space(socket.kind), socket.port]
        self.homes.remove(cid)

    @rule(data=st.data(), kind=kinds, cid=cids, port=ports, privileged=st.booleans())
    def bind(self, data: st.DataObject, kind: Kind, cid: int, port: int, privileged: bool) -> None:
        home = data.draw(st.sampled_from(sorted(self.homes)), "home")
        expected = 0
        if cid not in (ANY, LOCAL, home):
            expected = errno.EADDRNOTAVAIL
        elif port < 1024 and not privileged:
            expected = errno.EACCES
        elif (home, space(kind), port) in self.held:
            expected = errno.EADDRINUSE
        made: list[Endpoint] = []

        def action() -> None:
            made.append(
                self.fabric.bind(self.context(home), kind, cid, port, SERVICE if privileged else ME)
            )

        if self.decide(expected, action):
            (real,) = made
            assert real.port == port or (port == ANY and 1024 <= real.port < ANY)
            key = (home, space(kind), real.port)
            assert key not in self.held
            self.held[key] = socket = Socket(real, kind, home, cid == LOCAL, real.port)
            assert real.address == socket.address

    @precondition(lambda self: self.sockets())
    @rule(data=st.data(), sizes=buffer_sizes)
    def listen(self, data: st.DataObject, sizes: BufferSizes) -> None:
        candidates = [one for one in self.sockets() if one.kind is not Kind.DATAGRAM]
        if candidates:
            socket = data.draw(st.sampled_from(candidates), "socket")
            self.fabric.listen(socket.real, sizes)
            socket.listening, socket.sizes = True, sizes

    @precondition(lambda self: self.sockets())
    @rule(data=st.data(), twice=st.booleans())
    def unbind(self, data: st.DataObject, twice: bool) -> None:
        socket = data.draw(st.sampled_from(self.sockets()), "socket")
        for _ in range(1 + twice):
            self.fabric.unbind(socket.real)
        del self.held[socket.home, space(socket.kind), socket.port]

    @rule(
        data=st.data(),
        kind=stream_kinds,
        cid=cids,
        port=ports,
        sizes=buffer_sizes,
        at_a_listener=st.booleans(),
    )
    def connect(
        self,
        data: st.DataObject,
        kind: Kind,
        cid: int,
        port: int,
        sizes: BufferSizes,
        at_a_listener: bool,
    ) -> None:
        home = data.draw(st.sampled_from(sorted(self.homes)), "home")
        listeners = [one for one in self.sockets() if one.listening]
        if at_a_listener and listeners:
            target = data.draw(st.sampled_from(listeners), "target")
            cid, port, kind = target.home, target.port, target.kind
        mine = [
            one
            for one in self.sockets()
            if one.home == home and one.kind is kind and not one.listening
        ]
        bound = data.draw(st.sampled_from([None, *mine]), "bound")

        expected, destination = self.verdict_on_path(home, cid, port)
        holder = self.held.get((destination, "connected", port))
        if not expected:
            if (
                not isinstance(holder, Socket)
                or not holder.listening
                or holder.kind is not kind
                or (holder.local_only and destination != home)
            ):
                expected = errno.ECONNRESET
            elif negotiate(sizes, holder.sizes) is None:
                expected = errno.EINVAL
            elif bound is not None and bound.local_only and destination != home:
                expected = errno.EHOSTUNREACH
        made: list[Connection] = []

        def action() -> None:
            context = self.context(home)
            listener = self.fabric.find_listener(context, kind, cid, port, ME)
            assert isinstance(holder, Socket)
            assert listener is holder.real
            made.append(
                self.fabric.connect(
                    context, listener, None if bound is None else bound.real, sizes, ME.credentials
                )
            )

        if self.decide(expected, action):
            (real,) = made
            key = (home, "connected", real.local[1])
            if bound is None:
                assert real.local[0] == home
                assert real.local[1] >= 1024
                assert key not in self.held
            else:
                assert real.local == bound.address
            assert real.peer == (destination, port)
            self.held[key] = Stream(real, home, destination, real.local[1])

    @precondition(lambda self: self.streams())
    @rule(data=st.data(), twice=st.booleans())
    def end(self, data: st.DataObject, twice: bool) -> None:
        stream = data.draw(st.sampled_from(self.streams()), "stream")
        for _ in range(1 + twice):
            self.fabric.end(stream.real.number)
        del self.held[stream.home, "connected", stream.port]

    @rule(data=st.data(), cid=cids, port=ports)
    def find_datagram(self, data: st.DataObject, cid: int, port: int) -> None:
        home = data.draw(st.sampled_from(sorted(self.homes)), "home")
        expected, destination = self.verdict_on_path(home, cid, port)
        holder = self.held.get((destination, "dgram", port))
        if not expected and (
            not isinstance(holder, Socket) or (holder.local_only and destination != home)
        ):
            expected = errno.ECONNREFUSED

        def action() -> None:
            found = self.fabric.find_datagram(self.context(home), cid, port, ME)
            assert isinstance(holder, Socket)
            assert found is holder.real

        self.decide(expected, action)

    # What always holds

    @invariant()
    def the_same_contexts_run(self) -> None:
        assert {context.cid for context in self.fabric.contexts} == self.homes

    @invariant()
    def the_same_ports_are_held_by_the_same(self) -> None:
        found = {
            (context.cid, name, port): holder
            for context in self.fabric.contexts
            for name, ports in (("connected", context.connected), ("dgram", context.datagrams))
            for port, holder in ports._holders.items()
        }
        assert found == {key: holder.real for key, holder in self.held.items()}

    @invariant()
    def every_stream_is_counted_once(self) -> None:
        assert self.fabric.connections == {
            stream.real.number: stream.real for stream in self.streams()
        }


FabricModel.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestFabric = FabricModel.TestCase
