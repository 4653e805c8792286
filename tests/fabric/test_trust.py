"""Trusted vSockets: which endpoints are trusted, and for which guests (guide page 24)."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from vsockets.fabric import (
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    Context,
    Credentials,
    Denied,
    EndpointKind,
    Fabric,
    Grant,
    Isolation,
    Profile,
    Rule,
    Settings,
    trust_of,
)
from vsockets.model.buffers import BufferSizes

from .programs import ADMIN, ME, YOU, StubProgram, granted

MINE = Context(3, "mine", ME.credentials.uid)
YOURS = Context(4, "yours", YOU.credentials.uid)

STREAMS = Grant(1000, None, None, True, False, None)
DATAGRAMS = Grant(1000, None, None, False, True, None)
LAB = Grant(1000, None, None, False, False, frozenset({"lab"}))
SHOP = Grant(1000, None, None, False, False, frozenset({"shop", ""}))


# Which programs


@pytest.mark.parametrize("kind", EndpointKind)
def test_a_program_with_cap_net_admin_is_trusted_by_every_guest(kind: EndpointKind) -> None:
    trust = trust_of(ADMIN, kind, Settings())
    assert trust.for_context(MINE)
    assert trust.for_context(YOURS)


@pytest.mark.parametrize("kind", EndpointKind)
def test_another_capability_gives_no_trust(kind: EndpointKind) -> None:
    program = StubProgram(capabilities={CAP_NET_BIND_SERVICE})
    assert not trust_of(program, kind, Settings()).for_context(YOURS)


@pytest.mark.parametrize("kind", EndpointKind)
def test_a_program_of_the_virtual_machines_owner_is_trusted_for_it_only(kind: EndpointKind) -> None:
    trust = trust_of(ME, kind, Settings())
    assert trust.for_context(MINE)
    assert not trust.for_context(YOURS)


def test_root_without_the_capability_is_not_trusted() -> None:
    """As in a container: the capability counts, not the user id."""
    root = StubProgram(Credentials(1, 0, 0))
    assert not trust_of(root, EndpointKind.STREAM, Settings()).for_context(MINE)


@pytest.mark.parametrize(
    ("grant", "trusted"),
    [
        (STREAMS, {EndpointKind.STREAM, EndpointKind.SEQPACKET}),
        (DATAGRAMS, {EndpointKind.DATAGRAM}),
        (LAB, set()),
    ],
)
def test_a_grant_is_for_one_type_of_socket(grant: Grant, trusted: set[EndpointKind]) -> None:
    program = granted(grant)
    settings = Settings(grants=(grant,))
    assert {
        kind for kind in EndpointKind if trust_of(program, kind, settings).for_context(YOURS)
    } == trusted


def test_grants_add_up() -> None:
    settings = Settings(grants=(STREAMS, DATAGRAMS))
    program = granted(STREAMS, DATAGRAMS)
    assert all(trust_of(program, kind, settings).for_context(YOURS) for kind in EndpointKind)


def test_a_grant_to_another_program_gives_no_trust() -> None:
    settings = Settings(grants=(STREAMS,))
    assert not trust_of(ME, EndpointKind.STREAM, settings).for_context(YOURS)


def test_a_removed_grant_gives_no_trust() -> None:
    assert not trust_of(granted(STREAMS), EndpointKind.STREAM, Settings()).for_context(YOURS)


# Domains


def test_programs_belong_to_the_hosts_domains() -> None:
    assert trust_of(ME, EndpointKind.STREAM, Settings()).domains == {""}
    settings = Settings(host_domains=frozenset({"", "lab"}))
    assert trust_of(ME, EndpointKind.STREAM, settings).domains == {"", "lab"}


def test_a_grants_domains_replace_those_of_the_host() -> None:
    settings = Settings(grants=(LAB, SHOP, STREAMS), host_domains=frozenset({"office"}))
    assert trust_of(granted(LAB), EndpointKind.STREAM, settings).domains == {"lab"}
    assert trust_of(granted(LAB, SHOP), EndpointKind.STREAM, settings).domains == {
        "lab",
        "shop",
        "",
    }
    assert trust_of(granted(STREAMS), EndpointKind.STREAM, settings).domains == {"office"}


def test_a_grant_may_set_an_empty_list_of_domains() -> None:
    outside = dataclasses.replace(LAB, domains=frozenset())
    settings = Settings(grants=(outside,))
    assert trust_of(granted(outside), EndpointKind.STREAM, settings).domains == frozenset()


# The time that counts


@pytest.fixture
def fabric() -> Fabric:
    """Return a fabric with a restricted guest of another user."""
    fabric = Fabric(owner=0)
    fabric.contexts.add(3, "", 5000).isolation = Isolation(Profile.RESTRICTED)
    return fabric


def test_a_listeners_trust_is_fixed_at_its_creation(fabric: Fabric) -> None:
    """Later changes of its program or of the configuration do not change it."""
    host, guest = fabric.contexts.host, fabric.contexts.require(3)
    fabric.settings = Settings(grants=(STREAMS,))
    listener = fabric.bind(host, EndpointKind.STREAM, 2, 5000, granted(STREAMS))
    fabric.listen(listener, BufferSizes())
    fabric.settings = Settings()
    later = fabric.bind(host, EndpointKind.STREAM, 2, 5001, granted(STREAMS))
    fabric.listen(later, BufferSizes())
    assert fabric.find_listener(guest, EndpointKind.STREAM, 2, 5000, ME) is listener
    with pytest.raises(Denied) as denied:
        fabric.find_listener(guest, EndpointKind.STREAM, 2, 5001, ME)
    assert (denied.value.errno, denied.value.rule) == (errno.ECONNRESET, Rule.RESTRICTED)


def test_a_bound_socket_has_its_own_trust_and_an_unbound_one_its_programs(fabric: Fabric) -> None:
    host, guest = fabric.contexts.host, fabric.contexts.require(3)
    target = fabric.bind(guest, EndpointKind.DATAGRAM, 3, 5000, ME)
    trusted = fabric.bind(host, EndpointKind.DATAGRAM, 2, 5000, ADMIN)
    other = fabric.bind(host, EndpointKind.DATAGRAM, 2, 5001, ME)
    find = fabric.find_datagram
    assert find(host, 3, 5000, ME, trusted) is target
    assert find(host, 3, 5000, ADMIN) is target
    for program, source in ((ADMIN, other), (ME, None)):
        with pytest.raises(Denied) as denied:
            find(host, 3, 5000, program, source)
        assert (denied.value.errno, denied.value.rule) == (errno.EACCES, Rule.RESTRICTED)


def test_only_the_hosts_endpoints_have_trust(fabric: Fabric) -> None:
    """And the kernel is not asked about other programs."""

    class Shy(StubProgram):
        def has_capability(self, capability: int) -> bool:
            raise AssertionError(f"asked for capability {capability}")

    guest, hypervisor = fabric.contexts.require(3), fabric.contexts.hypervisor
    assert fabric.bind(guest, EndpointKind.STREAM, 3, 5000, Shy()).trust is None
    service = Shy(Credentials(1, 0, 0))
    assert fabric.bind(hypervisor, EndpointKind.STREAM, 0, 5000, service).trust is None


def test_capabilities_have_linuxs_numbers() -> None:
    """The numbers are those of ``linux/capability.h``."""
    assert (CAP_NET_BIND_SERVICE, CAP_NET_ADMIN) == (10, 12)
