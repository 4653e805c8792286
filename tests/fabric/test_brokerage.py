"""Decisions of the fabric: bind, listen, connect, and finding datagram sockets."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from vsockets.fabric import (
    Context,
    DeviceDatagrams,
    DevicePorts,
    Endpoint,
    EndpointKind,
    Fabric,
    Refused,
)
from vsockets.fabric.model import Ports
from vsockets.model.buffers import BufferSizes
from vsockets.model.constants import VMADDR_CID_LOCAL

from .programs import ME, SERVICE, YOU, StubProgram

ANY = 2**32 - 1
LOCAL = 1
STREAMS = [EndpointKind.STREAM, EndpointKind.SEQPACKET]


class House:
    """A fabric with a host and two guests, and short methods for what tests do with it."""

    def __init__(self) -> None:
        self.fabric = Fabric(owner=0)
        self.host = self.fabric.contexts.host
        self.guest = self.fabric.contexts.add(3, "", 0)
        self.other = self.fabric.contexts.add(4, "", 0)

    def bind(
        self,
        context: Context,
        port: int = ANY,
        *,
        cid: int = ANY,
        kind: EndpointKind = EndpointKind.STREAM,
        privileged: bool = False,
        cookie: int = 0,
    ) -> Endpoint:
        program = SERVICE if privileged else ME
        return self.fabric.bind(context, kind, cid, port, program, cookie)

    def listen(
        self,
        context: Context,
        port: int,
        *,
        cid: int = ANY,
        kind: EndpointKind = EndpointKind.STREAM,
    ) -> Endpoint:
        endpoint = self.bind(context, port, cid=cid, kind=kind)
        self.fabric.listen(endpoint, BufferSizes())
        return endpoint


@pytest.fixture
def house() -> House:
    return House()


def refusal(code: int, function: Callable[..., object], *arguments: object, **named: object) -> str:
    """Check that a call is refused with an errno; return the rule."""
    with pytest.raises(Refused) as refused:
        function(*arguments, **named)
    assert errno.errorcode[refused.value.errno] == errno.errorcode[code]
    return refused.value.reason


class TestBind:
    def test_wildcards_are_filled_in(self, house: House) -> None:
        endpoint = house.bind(house.guest)
        assert endpoint.cid == 3
        assert 1024 <= endpoint.port < ANY
        assert endpoint.address == (3, endpoint.port)
        assert house.guest.connected.get(endpoint.port) is endpoint

    def test_own_cid_and_a_port(self, house: House) -> None:
        assert house.bind(house.guest, 5000, cid=3).address == (3, 5000)

    def test_the_local_cid_is_kept(self, house: House) -> None:
        assert house.bind(house.guest, 5000, cid=LOCAL).address == (1, 5000)

    @pytest.mark.parametrize("cid", [0, 2, 4, 5, ANY - 1])
    def test_another_contexts_cid_is_refused(self, house: House, cid: int) -> None:
        refusal(errno.EADDRNOTAVAIL, house.bind, house.guest, 5000, cid=cid)
        assert len(house.guest.connected) == 0

    def test_port_in_use(self, house: House) -> None:
        house.bind(house.guest, 5000)
        refusal(errno.EADDRINUSE, house.bind, house.guest, 5000)
        refusal(errno.EADDRINUSE, house.bind, house.guest, 5000, cid=LOCAL)

    def test_every_context_has_its_own_ports(self, house: House) -> None:
        for context in (house.host, house.guest, house.other):
            house.bind(context, 5000)

    def test_streams_and_packets_share_ports_and_datagrams_have_their_own(
        self, house: House
    ) -> None:
        house.bind(house.guest, 5000, kind=EndpointKind.STREAM)
        refusal(errno.EADDRINUSE, house.bind, house.guest, 5000, kind=EndpointKind.SEQPACKET)
        house.bind(house.guest, 5000, kind=EndpointKind.DATAGRAM)
        refusal(errno.EADDRINUSE, house.bind, house.guest, 5000, kind=EndpointKind.DATAGRAM)

    @pytest.mark.parametrize("port", [0, 1, 1023])
    def test_reserved_ports(self, house: House, port: int) -> None:
        refusal(errno.EACCES, house.bind, house.guest, port)
        assert house.bind(house.guest, port, privileged=True).port == port

    @pytest.mark.parametrize("port", [1024, ANY - 1, ANY])
    def test_other_ports_need_no_privilege_check(self, house: House, port: int) -> None:
        class Shy(StubProgram):
            def has_capability(self, capability: int) -> bool:
                raise AssertionError("asked for a privilege that is not needed")

        house.fabric.bind(house.guest, EndpointKind.STREAM, ANY, port, Shy())

    def test_unbind_frees_the_port(self, house: House) -> None:
        for kind in EndpointKind:
            endpoint = house.bind(house.guest, 5000, kind=kind)
            house.fabric.unbind(endpoint)
            successor = house.bind(house.guest, 5000, kind=kind)
            house.fabric.unbind(endpoint)  # late, and not the holder any more
            refusal(errno.EADDRINUSE, house.bind, house.guest, 5000, kind=kind)
            house.fabric.unbind(successor)


class TestFindListener:
    @pytest.mark.parametrize("kind", STREAMS)
    def test_each_permitted_context_finds_a_listener(
        self, house: House, kind: EndpointKind
    ) -> None:
        listener = house.listen(house.host, 5000, kind=kind)
        for context in (house.host, house.guest, house.other):
            assert house.fabric.find_listener(context, kind, 2, 5000, ME) is listener

    def test_host_to_guest(self, house: House) -> None:
        listener = house.listen(house.guest, 5000)
        assert house.fabric.find_listener(house.host, EndpointKind.STREAM, 3, 5000, ME) is listener

    def test_within_a_guest_by_its_cid_and_by_the_local_one(self, house: House) -> None:
        listener = house.listen(house.guest, 5000)
        for cid in (3, LOCAL):
            assert (
                house.fabric.find_listener(house.guest, EndpointKind.STREAM, cid, 5000, ME)
                is listener
            )

    def test_another_guest_answers_like_a_missing_one(self, house: House) -> None:
        house.listen(house.other, 5000)
        find = house.fabric.find_listener
        refusal(errno.EHOSTUNREACH, find, house.guest, EndpointKind.STREAM, 4, 5000, ME)
        refusal(errno.EHOSTUNREACH, find, house.guest, EndpointKind.STREAM, 99, 5000, ME)
        # The answer is the same with a listener there.
        refusal(errno.EHOSTUNREACH, find, house.guest, EndpointKind.STREAM, 4, 5001, ME)

    def test_a_removed_context_is_unknown(self, house: House) -> None:
        house.listen(house.guest, 5000)
        house.fabric.contexts.remove(3)
        refusal(
            errno.EHOSTUNREACH,
            house.fabric.find_listener,
            house.host,
            EndpointKind.STREAM,
            3,
            5000,
            ME,
        )

    def test_unbound_and_not_listening_ports_are_refused(self, house: House) -> None:
        find = house.fabric.find_listener
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 2, 5000, ME)
        house.bind(house.host, 5000)
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 2, 5000, ME)
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 0, 5000, ME)

    def test_a_connections_port_does_not_listen(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        connection = house.fabric.connect(
            house.guest, listener, None, BufferSizes(), ME.credentials
        )
        find = house.fabric.find_listener
        refusal(errno.ECONNRESET, find, house.host, EndpointKind.STREAM, *connection.local, ME)

    def test_another_socket_type_is_refused(self, house: House) -> None:
        house.listen(house.host, 5000, kind=EndpointKind.SEQPACKET)
        find = house.fabric.find_listener
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 2, 5000, ME)
        house.bind(house.host, 6000, kind=EndpointKind.DATAGRAM)
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 2, 6000, ME)

    @pytest.mark.parametrize(
        ("address", "code"),
        [((ANY, 5000), errno.ENODEV), ((2, ANY), errno.ECONNRESET), ((ANY, ANY), errno.ENODEV)],
    )
    def test_wildcards(self, house: House, address: tuple[int, int], code: int) -> None:
        house.listen(house.guest, 5000)
        refusal(code, house.fabric.find_listener, house.guest, EndpointKind.STREAM, *address, ME)

    def test_a_listener_on_the_local_cid_is_reached_from_its_own_context_only(
        self, house: House
    ) -> None:
        listener = house.listen(house.guest, 5000, cid=LOCAL)
        find = house.fabric.find_listener
        refusal(errno.ECONNRESET, find, house.host, EndpointKind.STREAM, 3, 5000, ME)
        assert find(house.guest, EndpointKind.STREAM, LOCAL, 5000, ME) is listener
        assert find(house.guest, EndpointKind.STREAM, 3, 5000, ME) is listener


class TestFallback:
    """Endpoints of the host for one guest, at ports without a listener of the fabric."""

    @pytest.fixture
    def beyond(self, house: House) -> Endpoint:
        endpoint = Endpoint(
            EndpointKind.STREAM, house.host, 2, 9900, ME.credentials, listening=True
        )
        house.guest.fallback = lambda kind, port: endpoint if port == 9900 else None
        return endpoint

    def test_it_applies_to_that_guest_only(self, house: House, beyond: Endpoint) -> None:
        find = house.fabric.find_listener
        assert find(house.guest, EndpointKind.STREAM, 2, 9900, YOU) is beyond
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 2, 9800, YOU)
        refusal(errno.ECONNRESET, find, house.other, EndpointKind.STREAM, 2, 9900, YOU)
        refusal(errno.ECONNRESET, find, house.host, EndpointKind.STREAM, 2, 9900, YOU)
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 0, 9900, YOU)
        refusal(errno.ECONNRESET, find, house.guest, EndpointKind.STREAM, 3, 9900, YOU)

    def test_a_listener_of_the_fabric_comes_first(self, house: House, beyond: Endpoint) -> None:
        listener = house.listen(house.host, 9900)
        find = house.fabric.find_listener
        assert find(house.guest, EndpointKind.STREAM, 2, 9900, YOU) is listener
        house.fabric.unbind(listener)
        assert find(house.guest, EndpointKind.STREAM, 2, 9900, YOU) is beyond


def test_watchers_are_called_for_listeners(house: House) -> None:
    told: list[tuple[Endpoint, bool]] = []
    house.fabric.watchers.append(
        lambda endpoint: told.append((endpoint, endpoint.context.connected.get(5000) is endpoint))
    )
    endpoint = house.bind(house.host, 5000)
    assert told == []
    house.fabric.listen(endpoint, BufferSizes())
    house.fabric.unbind(endpoint)
    house.fabric.unbind(house.bind(house.host, 5000))  # it never listened
    assert told == [(endpoint, True), (endpoint, False)]


class TestConnect:
    def test_both_addresses(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        connection = house.fabric.connect(
            house.guest, listener, None, BufferSizes(), YOU.credentials
        )
        assert connection.peer == (2, 5000)
        assert connection.local[0] == 3
        assert connection.local[1] >= 1024
        assert (connection.context, connection.peer_context) == (house.guest, house.host)
        assert (connection.owner, connection.listener.owner) == (
            YOU.credentials,
            ME.credentials,
        )
        assert connection.kind is EndpointKind.STREAM
        assert house.fabric.connections == {connection.number: connection}

    def test_the_connecting_port_is_held_until_the_end(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        connection = house.fabric.connect(
            house.guest, listener, None, BufferSizes(), ME.credentials
        )
        port = connection.local[1]
        refusal(errno.EADDRINUSE, house.bind, house.guest, port)
        house.fabric.end(connection.number)
        assert house.fabric.connections == {}
        successor = house.bind(house.guest, port)
        house.fabric.end(connection.number)
        assert house.guest.connected.get(port) is successor

    def test_a_bound_socket_keeps_its_address(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        bound = house.bind(house.guest, 700, privileged=True)
        connection = house.fabric.connect(
            house.guest, listener, bound, BufferSizes(), ME.credentials
        )
        assert connection.local == (3, 700)
        assert house.guest.connected.get(700) is connection
        house.fabric.unbind(bound)  # what is left of it holds nothing any more
        refusal(errno.EADDRINUSE, house.bind, house.guest, 700, privileged=True)
        house.fabric.end(connection.number)
        assert len(house.guest.connected) == 0

    def test_a_socket_bound_to_the_local_cid_reaches_its_own_context_only(
        self, house: House
    ) -> None:
        away, home = house.listen(house.host, 5000), house.listen(house.guest, 5000)
        bound = house.bind(house.guest, 5001, cid=LOCAL)
        connect = house.fabric.connect
        refusal(
            errno.EHOSTUNREACH, connect, house.guest, away, bound, BufferSizes(), ME.credentials
        )
        assert house.guest.connected.get(5001) is bound
        assert connect(house.guest, home, bound, BufferSizes(), ME.credentials).local == (1, 5001)

    def test_a_listener_accepts_many_connections(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        made = [
            house.fabric.connect(house.guest, listener, None, BufferSizes(), ME.credentials)
            for _ in range(50)
        ]
        assert len({connection.local for connection in made}) == 50
        assert len({connection.number for connection in made}) == 50
        assert house.host.connected.get(5000) is listener

    def test_connections_outlive_the_listener(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        connection = house.fabric.connect(
            house.guest, listener, None, BufferSizes(), ME.credentials
        )
        house.fabric.unbind(listener)
        assert connection.number in house.fabric.connections
        house.listen(house.host, 5000)

    def test_buffer_sizes_are_agreed_on(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        house.fabric.listen(listener, BufferSizes(32_768, 128, 32_768))
        connection = house.fabric.connect(
            house.guest, listener, None, BufferSizes(), ME.credentials
        )
        assert connection.size == 32_768

    def test_a_connect_without_a_common_size_has_no_effect(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        house.fabric.listen(listener, BufferSizes(1024, 128, 2048))
        bound = house.bind(house.guest, 5001)
        large = BufferSizes(65_536, 65_536, 262_144)
        connect = house.fabric.connect
        rule = refusal(errno.EINVAL, connect, house.guest, listener, bound, large, ME)
        assert "buffer size" in rule
        assert house.guest.connected.get(5001) is bound
        assert house.fabric.connections == {}

    def test_numbers_start_over_and_skip_those_in_use(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        first = house.fabric.connect(house.guest, listener, None, BufferSizes(), ME.credentials)
        assert first.number == 1
        house.fabric.last_number = 2**31 - 2
        numbers = [
            house.fabric.connect(house.guest, listener, None, BufferSizes(), ME.credentials).number
            for _ in range(2)
        ]
        assert numbers == [2**31 - 1, 2]

    def test_ending_an_unknown_connection_has_no_effect(self, house: House) -> None:
        house.fabric.end(0)
        house.fabric.end(12345)


class TestFindDatagram:
    def test_found(self, house: House) -> None:
        endpoint = house.bind(house.host, 5000, kind=EndpointKind.DATAGRAM)
        for context in (house.host, house.guest):
            assert house.fabric.find_datagram(context, 2, 5000, ME) is endpoint

    def test_an_unbound_port_is_refused(self, house: House) -> None:
        house.listen(house.host, 5000)
        refusal(errno.ECONNREFUSED, house.fabric.find_datagram, house.guest, 2, 5000, ME)
        refusal(errno.ECONNREFUSED, house.fabric.find_datagram, house.guest, 0, 5000, ME)

    def test_another_guest_answers_like_a_missing_one(self, house: House) -> None:
        house.bind(house.other, 5000, kind=EndpointKind.DATAGRAM)
        for cid in (4, 99):
            refusal(errno.EHOSTUNREACH, house.fabric.find_datagram, house.guest, cid, 5000, ME)

    def test_wildcards(self, house: House) -> None:
        find = house.fabric.find_datagram
        refusal(errno.EINVAL, find, house.guest, 2, ANY, ME)
        refusal(errno.EINVAL, find, house.guest, ANY, ANY, ME)
        refusal(errno.ECONNREFUSED, find, house.guest, ANY, 5000, ME)
        endpoint = house.bind(house.guest, 5000, kind=EndpointKind.DATAGRAM)
        assert find(house.guest, ANY, 5000, ME) is endpoint

    def test_bound_to_the_local_cid(self, house: House) -> None:
        endpoint = house.bind(house.guest, 5000, cid=LOCAL, kind=EndpointKind.DATAGRAM)
        refusal(errno.ECONNREFUSED, house.fabric.find_datagram, house.host, 3, 5000, ME)
        assert house.fabric.find_datagram(house.guest, LOCAL, 5000, ME) is endpoint

    def test_from_the_local_cid(self, house: House) -> None:
        source = house.bind(house.guest, 5001, cid=LOCAL, kind=EndpointKind.DATAGRAM)
        away, home = (
            house.bind(context, 5000, kind=EndpointKind.DATAGRAM)
            for context in (house.host, house.guest)
        )
        find = house.fabric.find_datagram
        assert find(house.guest, 2, 5000, ME) is away
        refusal(errno.EHOSTUNREACH, find, house.guest, 2, 5000, ME, source)
        assert find(house.guest, 3, 5000, ME, source) is home


class TestCookies:
    """Finding a socket by its cookie; tests/daemon covers what is found."""

    def test_no_cookie_outlives_its_socket(self, house: House) -> None:
        listener = house.listen(house.host, 5000)
        first, second = house.bind(house.guest, cookie=77), house.bind(house.guest, cookie=77)
        bound = house.bind(house.guest, 5001, cookie=78)
        connection = house.fabric.connect(
            house.guest, listener, bound, BufferSizes(), ME.credentials, 78
        )
        assert len(house.guest.cookies) == 2
        house.fabric.end(connection.number)
        for endpoint in (second, first, bound, listener):
            house.fabric.unbind(endpoint)
        assert len(house.guest.cookies) == 0

    def test_a_socket_without_a_cookie_is_not_registered(self, house: House) -> None:
        house.bind(house.guest)
        assert len(house.guest.cookies) == 0


class StubDevice:
    """The handle of a guest's stream endpoints."""

    def close(self) -> None: ...
    def refresh(self) -> None: ...
    def set_datagrams(self, datagrams: DeviceDatagrams) -> None: ...
    def send_capture(self, fd: int, limit: int, port: int) -> None: ...
    def send_buffer_size(self, own: tuple[int, int], peer: tuple[int, int], size: int) -> None: ...


@pytest.mark.parametrize("size", [0, 4096])
def test_device_settles_a_connect_from_the_local_cid(size: int) -> None:
    fabric = Fabric(owner=0)
    guest = fabric.contexts.add(3, "", 1000)
    guest.device = DevicePorts(ME.credentials, StubDevice(), None)
    bound = fabric.bind(guest, EndpointKind.STREAM, VMADDR_CID_LOCAL, 5000, ME)
    listener = fabric.find_listener(guest, EndpointKind.STREAM, VMADDR_CID_LOCAL, 80, ME, bound)
    connection = fabric.connect(guest, listener, bound, BufferSizes(), ME.credentials)
    assert fabric.complete_pending(guest, 80, connection.local, size)
    assert (connection.number in fabric.connections) is (size > 0)


def test_an_assigned_port_is_neither_held_nor_reserved() -> None:
    ports: Ports[int] = Ports()
    ports.following = first = 4_294_967_293
    ports.claim(first, 1)
    assert ports.find_ephemeral(lambda port: port == first + 1) == 1024
    assert ports.next_ephemeral() == 1024
    with pytest.raises(Refused) as refused:
        ports.find_ephemeral(lambda _: True)
    assert refused.value.errno == errno.EADDRNOTAVAIL
