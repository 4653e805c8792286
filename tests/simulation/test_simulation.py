"""The simulator finds no failure, and finds known faults when they are planted."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from forms import choose
from vsockets.daemon import handover, recovery
from vsockets.daemon.broker import Broker
from vsockets.daemon.channel import Channel
from vsockets.daemon.datagrams import DatagramSocket, Route
from vsockets.daemon.device_link import HandoffLink
from vsockets.daemon.in_flight import InFlight, Step
from vsockets.daemon.journal import Journal
from vsockets.daemon.named_sockets import NamedSocket
from vsockets.daemon.stream_liveness import StreamLiveness
from vsockets.daemon.streams import Streams
from vsockets.devices.limits import VIRTIO_MERGED_PACKET_MAX_BYTES
from vsockets.devices.virtio.connection import VirtioConnection
from vsockets.devices.virtio.credit import ReceiveCredit, SendCredit
from vsockets.devices.virtio.ring import SplitRing
from vsockets.devices.virtio.rx import ReceiveQueue
from vsockets.devices.vmci.flow_control import AttachOrdering
from vsockets.devices.vmci.stream import Stream as VmciStream
from vsockets.fabric import Change, Connection, Endpoint, Fabric, fabric, life_cycle, policy
from vsockets.fabric.model import Ports

from . import fabric_handover
from .__main__ import WORLDS, main
from .broker_world import BrokerWorld
from .datagram_world import DatagramWorld
from .engine import Failure, World, generate, run, shorten, simulate
from .fabric_world import FabricWorld
from .killed_world import KilledWorld
from .named_world import NamedWorld
from .virtio_device_world import VirtioDeviceWorld
from .virtio_world import VirtioWorld
from .vmci_world import VmciWorld

SECONDS = choose(6, 16)  #: of one core, for all worlds
STEPS = 300

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("world", WORLDS)
def test_no_seed_fails(world: type[World]) -> None:
    end, seed = monotonic() + SECONDS / len(WORLDS), 0
    while monotonic() < end:
        simulate(world, seed, STEPS)
        seed += 1
    assert seed


@pytest.mark.parametrize("world", WORLDS)
def test_a_seed_decides_everything(world: type[World]) -> None:
    assert generate(world, 1, STEPS) == generate(world, 1, STEPS)
    assert generate(world, 1, STEPS) != generate(world, 2, STEPS)


class Counting(World):
    """A world that fails after twelve of one action and one of another."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def do_a(self, _: object) -> None:
        self.taken.append("a")

    def do_b(self, _: object) -> None:
        self.taken.append("b")

    do_c = do_b

    def do_d(self, _: object) -> None:
        assert self.taken.count("a") < 12


def test_history_is_shortened() -> None:
    history = [(name, number) for number in range(40) for name in "abc"] + [("d", 0), ("a", 1)]
    history = shorten(Counting, 0, history).history
    assert [name for name, _ in history] == [*"aaaaaaaaaaaa", "d"]


# Planted faults


def report_for_an_earlier_connect(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: a device's report was taken for one on the port's next connect."""
    patch.setattr(FabricWorld, "_require_settled", lambda *_: None)


def local_connect_is_not_settled(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: a report on a connect from the local CID was ignored."""
    complete = Fabric.complete_pending

    def faulty(self: Fabric, guest: Any, port: int, peer: tuple[int, int], size: int) -> bool:
        return peer[0] != 1 and complete(self, guest, port, peer, size)

    patch.setattr(Fabric, "complete_pending", faulty)


def port_of_a_pending_connect_is_assigned(patch: pytest.MonkeyPatch) -> None:
    """Mended in "daemon: assign no port whose last connect is pending at a device"."""
    find = Ports.find_ephemeral
    patch.setattr(Ports, "find_ephemeral", lambda self, _=None: find(self))


def refused_connect_unbinds(patch: pytest.MonkeyPatch) -> None:
    """Mended in a11429b and 120db5e: a bound socket lost its port when a connect was refused."""
    patch.setattr(Fabric, "rebind", lambda *_: None)


def local_cid_is_a_source_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """Mended in a3d120c: a datagram from the local CID read as one of the receiver's own."""
    patch.setattr(fabric, "_require_scope", lambda *_: None)


def any_holder_releases(patch: pytest.MonkeyPatch) -> None:
    """The close of a refused socket releases the port that its stream has taken over."""
    patch.setattr(Ports, "release", lambda self, port, _: self.pop(port, None) is not None)


def released_sockets_stay_counted(patch: pytest.MonkeyPatch) -> None:
    """A party reaches its limit of sockets without having any."""
    end = Fabric.end

    def faulty(self: Fabric, number: int) -> None:
        connection = self.connections.get(number)
        end(self, number)
        if connection is not None and connection.cookie % 5 == 0:
            connection.party.sockets += 1

    patch.setattr(Fabric, "end", faulty)


def migration_keeps_streams(patch: pytest.MonkeyPatch) -> None:
    """Guide page 7: vSockets "do not survive live migration"."""
    drops = life_cycle.DROPS_CONNECTIONS - {Change.MIGRATE}
    patch.setattr(life_cycle, "DROPS_CONNECTIONS", drops)


def fault_tolerance_of_the_destination(patch: pytest.MonkeyPatch) -> None:
    """A guest in FT mode is connected to."""
    path = policy.require_path
    patch.setattr(
        policy, "require_path", lambda a, b, connecting: path(a, b, connecting and a.fault_tolerant)
    )


def trust_of_the_moment(patch: pytest.MonkeyPatch) -> None:
    """Trust is that of the connecting guest's side, not that of the endpoint's creation."""
    trust = policy.require_trust
    patch.setattr(policy, "require_trust", lambda *a: None if a[3] and a[0].cid == 4 else trust(*a))


def domains_are_ignored(patch: pytest.MonkeyPatch) -> None:
    """Legacy guests of different domains reach each other."""
    patch.setattr(policy, "_require_neighbours", lambda *_: None)


def replaced_vsockd_forgets_parties(patch: pytest.MonkeyPatch) -> None:
    """After a replace, a socket's port is not counted for its party."""
    restore = handover.restore_endpoint

    def faulty(reader: Any, saved: Any) -> Endpoint:
        return restore(reader, saved | {"party": None})

    patch.setattr(fabric_handover, "restore_endpoint", faulty)


def replaced_vsockd_forgets_ports(patch: pytest.MonkeyPatch) -> None:
    """After a replace, the port of an established stream is free."""
    restore = handover.restore_connections

    def faulty(reader: Any, saved: list[Any]) -> list[Connection]:
        return restore(reader, [(*one[:11], False, one[12]) for one in saved])

    patch.setattr(fabric_handover, "restore_connections", faulty)


def unread_packets_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Mended in "virtio: count the packets that a guest has not read, as Linux does"."""
    patch.setattr(SendCredit, "packet_size", lambda self, room: room)


def credit_comes_late(patch: pytest.MonkeyPatch) -> None:
    """Mended in "credit in time for guests that limit themselves": of the device's buffer only."""
    due = ReceiveCredit.update_is_due
    patch.setattr(ReceiveCredit, "update_is_due", lambda self, _: due(self, self.size))


def small_packets_in_smaller_buffers(patch: pytest.MonkeyPatch) -> None:
    """Mended in ddc0a3e: a small packet was moved into a buffer that takes less."""

    def faulty(self: Any, connection: VirtioConnection, received: int) -> int:
        size = VIRTIO_MERGED_PACKET_MAX_BYTES
        sizes = [min(size, received - at) for at in range(0, received, size)]
        return sum(self._write_headers(connection, one) for one in sizes)

    patch.setattr(ReceiveQueue, "_write_merged_headers", faulty)


def rest_of_a_write_is_lost(patch: pytest.MonkeyPatch) -> None:
    """Bytes for which the socket has no room are not kept."""
    patch.setattr(VirtioConnection, "_save", lambda *_: None)


def kick_is_lost(patch: pytest.MonkeyPatch) -> None:
    """A packet that comes while the device requests the next kick waits for ever."""
    enable = SplitRing.enable_notification

    def faulty(self: SplitRing, chains: int = 1) -> bool:
        return enable(self, chains) and self._size == 0

    patch.setattr(SplitRing, "enable_notification", faulty)
    pop = SplitRing.pop

    def late(self: SplitRing) -> Any:
        # As if the packet had come after the queue was found empty.
        return None if random.random() < 0.1 else pop(self)

    patch.setattr(SplitRing, "pop", late)


def reset_overtakes_the_last_bytes(patch: pytest.MonkeyPatch) -> None:
    """A stream that the guest has closed is reset before all its bytes are forwarded."""
    patch.setattr(VirtioConnection, "finish_if_drained", VirtioConnection.on_all_forwarded)


def packets_overtake_the_attach(patch: pytest.MonkeyPatch) -> None:
    """Mended in 0f7f4bb: a connecting guest fails with EPROTO by a packet after the ATTACH."""
    patch.setattr(AttachOrdering, "send", lambda self, *packet: self._send(*packet))


def detach_overtakes_the_attach(patch: pytest.MonkeyPatch) -> None:
    """Mended in 9ed7fc6: a connecting guest takes the event for a reset."""
    hang_up = VmciStream._hang_up

    def faulty(self: VmciStream) -> None:
        self.was_used = True
        hang_up(self)

    patch.setattr(VmciStream, "_hang_up", faulty)


def detached_bytes_are_lost(patch: pytest.MonkeyPatch) -> None:
    """Bytes in the queue of a guest that closes are not delivered."""
    patch.setattr(VmciStream, "_copy_rest", lambda _: None)


def withheld_byte_is_not_published(patch: pytest.MonkeyPatch) -> None:
    """The guest's queue looks neither empty nor full, and nobody polls it."""
    patch.setattr(VmciStream, "_poll", lambda _: None)


def refused_socket_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """Mended in a11429b: a bound socket of a guest at its limit lost its port."""

    def faulty(self: Channel) -> bool:
        limits = self.party.limits
        return limits is None or self.party.channels < limits.sockets

    patch.setattr(Channel, "may_retry", faulty)


def link_does_not_wait_for_reports(patch: pytest.MonkeyPatch) -> None:
    """Mended in cc0094c, in vsockd itself."""
    patch.setattr(HandoffLink, "require_settled", lambda *_: None)


def full_link_unbinds(patch: pytest.MonkeyPatch) -> None:
    """Mended in e16f3df: a connect that a full link refuses unbinds its socket."""
    patch.setattr(
        Broker, "_abandon", lambda self, _, connection: self.fabric.end(connection.number)
    )


def last_descriptor_is_lost(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: no descriptor was left for the epoll of a party's first client."""

    def faulty(self: Broker, channel: Channel) -> None:
        self._channels.setdefault(channel.context, set()).add(channel)
        channel.party.channels += 1
        fd = channel.sock.fileno()
        self._turns.watch(channel.party, fd, lambda hung_up: self.serve_kept(channel, hung_up))

    patch.setattr(Broker, "_keep", faulty)


def closed_link_is_handed_over_once(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: the next replacement failed with an AttributeError."""
    patch.setattr(handover.Reader, "link", lambda self, at: self if at < 0 else self.links[at])


def route_is_revoked_twice(patch: pytest.MonkeyPatch) -> None:
    """Mended in 5112dc9 and 832f451: vsockd got EBADF when it revoked a route again."""

    def faulty(self: Route) -> None:
        self.inbound.pop(self, None)
        self.sender.routes.pop(self.destination, None)
        self.sender.quota.revoke(self)

    patch.setattr(Route, "revoke", faulty)


def closed_socket_keeps_its_routes(patch: pytest.MonkeyPatch) -> None:
    """A process that has kept a route sends with the source of the port's next holder."""
    patch.setattr(DatagramSocket, "close", NamedSocket.close)


def closed_listener_is_handed_over(patch: pytest.MonkeyPatch) -> None:
    """Mended in 9910b89: its descriptor was closed, or another's: vsockd was not replaced."""
    drop = Broker.drop

    def faulty(self: Broker, channel: Channel) -> None:
        endpoint = channel.endpoint
        handle = None if endpoint is None else endpoint.handle
        drop(self, channel)
        if endpoint is not None:
            endpoint.handle = handle

    patch.setattr(Broker, "drop", faulty)
    closed_path_is_handed_over(patch)


def closed_path_is_handed_over(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: the same, for a port that a refused connect has moved."""
    patch.setattr(NamedSocket, "close", lambda self: os.close(self.node))


def stream_ended_since_its_row_was_sent(patch: pytest.MonkeyPatch) -> None:
    """A new vsockd has a stream that has ended while its predecessor served on."""
    patch.setattr(Streams, "end", lambda *_: None)


def connection_since_its_listener_was_sent(patch: pytest.MonkeyPatch) -> None:
    """A new vsockd does not count a connection that waits to be accepted."""
    patch.setattr(Channel, "version", property(lambda self: self.requests))


def step_is_done_again(patch: pytest.MonkeyPatch) -> None:
    """A vsockd that is started again repeats a reply, or an announcement, that was sent."""
    send = InFlight.send

    def faulty(self: InFlight, step: Step, *arguments: Any) -> None:
        self._calls[step].message.len = 0
        send(self, step, *arguments)

    patch.setattr(InFlight, "send", faulty)


def entry_is_written_after_the_reply(patch: pytest.MonkeyPatch) -> None:
    """A reply is sent before the journal has what it says."""
    commit = Journal.commit
    patch.setattr(Journal, "commit", lambda self, left=None: None if left else commit(self))


def port_of_the_last_connect_overflows(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: after the last port, vsockd assigned invalid ones."""
    patch.setattr(recovery, "VMADDR_PORT_ANY", 1 << 40)


def no_group_is_checked(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: a request was lost that made vsockd look for closed streams."""

    def faulty(self: StreamLiveness) -> None:
        self.check(next(iter(self._groups.values())))

    patch.setattr(StreamLiveness, "check_oldest", faulty)


def retry_is_not_recorded(patch: pytest.MonkeyPatch) -> None:
    """Mended in 46eba37: a client that may try again was forgotten when vsockd was killed twice."""
    resume = Broker.resume

    def faulty(self: Broker, channel: Channel) -> None:
        resume(self, channel)
        if self.journal is not None:
            self.journal._channels.pop(channel, None)

    patch.setattr(Broker, "resume", faulty)


def refused_offer_is_not_recorded(patch: pytest.MonkeyPatch) -> None:
    """Found by this simulator: a bound socket that a full link refuses was forgotten."""
    record = Journal.channel

    def faulty(self: Journal, channel: Channel) -> None:
        if channel not in self._handed_off:
            record(self, channel)

    patch.setattr(Journal, "channel", faulty)


#: Their histories are not shortened: that would take half a minute for each.
KILLED_FAULTS: dict[Plant, int] = {
    step_is_done_again: 5,
    entry_is_written_after_the_reply: 6,
    retry_is_not_recorded: 261,
    refused_offer_is_not_recorded: 92,
    port_of_the_last_connect_overflows: 39,
    no_group_is_checked: 15,
}


@pytest.mark.parametrize("plant", KILLED_FAULTS)
def test_planted_fault_of_the_journal_is_found(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    seed = find(KilledWorld, KILLED_FAULTS[plant], 8)
    assert_mended(KilledWorld, seed, monkeypatch)


NAMED_FAULTS: list[Plant] = [closed_listener_is_handed_over, closed_path_is_handed_over]

DATAGRAM_FAULTS: list[Plant] = [route_is_revoked_twice, closed_socket_keeps_its_routes]

BROKER_FAULTS: list[Plant] = [
    refused_socket_is_dropped,
    link_does_not_wait_for_reports,
    full_link_unbinds,
    last_descriptor_is_lost,
    closed_link_is_handed_over_once,
    stream_ended_since_its_row_was_sent,
    connection_since_its_listener_was_sent,
]

VIRTIO_DEVICE_FAULTS: list[Plant] = [kick_is_lost, reset_overtakes_the_last_bytes]

VMCI_FAULTS: list[Plant] = [
    packets_overtake_the_attach,
    detach_overtakes_the_attach,
    detached_bytes_are_lost,
    withheld_byte_is_not_published,
]

VIRTIO_FAULTS: list[Plant] = [
    unread_packets_are_not_counted,
    credit_comes_late,
    small_packets_in_smaller_buffers,
    rest_of_a_write_is_lost,
]

FABRIC_FAULTS: list[Plant] = [
    report_for_an_earlier_connect,
    local_connect_is_not_settled,
    port_of_a_pending_connect_is_assigned,
    refused_connect_unbinds,
    local_cid_is_a_source_elsewhere,
    any_holder_releases,
    released_sockets_stay_counted,
    migration_keeps_streams,
    fault_tolerance_of_the_destination,
    trust_of_the_moment,
    domains_are_ignored,
    replaced_vsockd_forgets_parties,
    replaced_vsockd_forgets_ports,
]


PLANTS: list[tuple[type[World], Plant]] = [
    *((FabricWorld, plant) for plant in FABRIC_FAULTS),
    *((VirtioWorld, plant) for plant in VIRTIO_FAULTS),
    *((VirtioDeviceWorld, plant) for plant in VIRTIO_DEVICE_FAULTS),
    *((VmciWorld, plant) for plant in VMCI_FAULTS),
    *((BrokerWorld, plant) for plant in BROKER_FAULTS),
    *((DatagramWorld, plant) for plant in DATAGRAM_FAULTS),
    *((NamedWorld, plant) for plant in NAMED_FAULTS),
]

#: the seed to begin with, for faults that few seeds find
FIRST_SEEDS: dict[Plant, int] = {
    any_holder_releases: 20,
    closed_link_is_handed_over_once: 54,
    closed_listener_is_handed_over: 74,
    closed_path_is_handed_over: 475,
    connection_since_its_listener_was_sent: 158,
    domains_are_ignored: 10,
    fault_tolerance_of_the_destination: 15,
    full_link_unbinds: 230,
    kick_is_lost: 24,
    last_descriptor_is_lost: 18,
    local_cid_is_a_source_elsewhere: 440,
    local_connect_is_not_settled: 1410,
    migration_keeps_streams: 25,
    port_of_a_pending_connect_is_assigned: 26,
    refused_connect_unbinds: 50,
    refused_socket_is_dropped: 76,
    report_for_an_earlier_connect: 10,
    reset_overtakes_the_last_bytes: 15,
    route_is_revoked_twice: 346,
    stream_ended_since_its_row_was_sent: 375,
    trust_of_the_moment: 50,
    withheld_byte_is_not_published: 18,
}


def find(world: type[World], first: int, seeds: int = 500) -> int:
    """Return the first seed that fails."""
    for seed in range(first, first + seeds):
        try:
            run(world, seed, generate(world, seed, STEPS))
        except Failure:
            return seed
    raise AssertionError(f"not found with {seeds} seeds")


@pytest.mark.parametrize(("world", "plant"), PLANTS, ids=[plant.__name__ for _, plant in PLANTS])
def test_planted_fault_is_found(
    world: type[World],
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The failing seed is found, and its history printed, from which no step can be left out."""
    plant(monkeypatch)
    seed = find(world, FIRST_SEEDS.get(plant, 0))
    assert main(["--seed", str(seed), "--world", world.__name__]) == 1
    headline, title, *steps = capsys.readouterr().out.splitlines()
    assert headline.startswith(f"{world.__name__}, seed {seed}: ")
    assert title == f"the shortest history that fails, {len(steps)} steps:"
    assert len(steps) <= 40
    history = [(name, int(number)) for name, number in map(str.split, steps)]
    with pytest.raises(Failure) as failure:
        run(world, seed, history)
    assert failure.value.history == history
    assert_mended(world, seed, monkeypatch)


def assert_mended(world: type[World], seed: int, patch: pytest.MonkeyPatch) -> None:
    """Check that without the planted fault the seed passes that has found it."""
    patch.undo()
    run(world, seed, generate(world, seed, STEPS))
