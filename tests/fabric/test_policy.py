"""Access decisions, one by one: the guide's chapter 5.

The tables are written from the guide's sentences, row by row, and not from ``policy.py``.
"""

from __future__ import annotations

import errno
import itertools

import pytest

from vsockets.fabric import (
    Context,
    Credentials,
    Denied,
    Endpoint,
    EndpointKind,
    Fabric,
    Isolation,
    Profile,
    Refused,
    Rule,
    Settings,
)
from vsockets.model.buffers import BufferSizes

from .programs import ADMIN, ME, ROOT, SERVICE, YOU, StubProgram

OWNER = 5000  #: of the guests; nobody's user id here but the owner's
PORT = 5000

THE_OWNERS = StubProgram(Credentials(300, OWNER, OWNER))

DEFAULT = Isolation()
RESTRICTED = Isolation(Profile.RESTRICTED)


def legacy(domain: str = "", *, unrestricted: bool = False) -> Isolation:
    return Isolation(Profile.LEGACY, unrestricted, domain)


ISOLATIONS = [
    DEFAULT,
    RESTRICTED,
    *(
        legacy(domain, unrestricted=unrestricted)
        for domain, unrestricted in itertools.product(["", "lab"], [False, True])
    ),
]


class House:
    """A host, a guest 3 of some isolation, and other contexts a test adds."""

    def __init__(self, isolation: Isolation, host_domains: frozenset[str] = frozenset({""})):
        self.fabric = Fabric(owner=0)
        self.fabric.settings = Settings(host_domains=host_domains)
        self.host = self.fabric.contexts.host
        self.hypervisor = self.fabric.contexts.hypervisor
        self.guest = self.add(3, isolation)

    def add(self, cid: int, isolation: Isolation) -> Context:
        context = self.fabric.contexts.add(cid, "", OWNER)
        context.isolation = isolation
        return context

    def serve(
        self, context: Context, kind: EndpointKind, program: StubProgram, port: int = PORT
    ) -> Endpoint:
        endpoint = self.fabric.bind(context, kind, context.cid, port, program)
        if kind is not EndpointKind.DATAGRAM:
            self.fabric.listen(endpoint, BufferSizes())
        return endpoint

    def reach(
        self, source: Context, kind: EndpointKind, program: StubProgram, cid: int, port: int = PORT
    ) -> Refused | None:
        """Return the rule that forbids a connect or send to ``(cid, port)``; None if allowed."""
        try:
            if kind is EndpointKind.DATAGRAM:
                self.fabric.find_datagram(source, cid, port, program)
            else:
                self.fabric.find_listener(source, kind, cid, port, program)
        except Refused as refused:
            return refused
        return None


def code(refused: Refused | None) -> str:
    return "allowed" if refused is None else errno.errorcode[refused.errno]


def rule(refused: Refused | None) -> Rule | None:
    return refused.rule if isinstance(refused, Denied) else None


every_kind = pytest.mark.parametrize("kind", EndpointKind)
every_isolation = pytest.mark.parametrize("isolation", ISOLATIONS, ids=str)


# Between guests


@every_kind
@pytest.mark.parametrize(
    ("here", "there"), list(itertools.product(ISOLATIONS, ISOLATIONS)), ids=str
)
def test_between_guests(here: Isolation, there: Isolation, kind: EndpointKind) -> None:
    """Allowed only if both have the legacy profile, one domain, and are unrestricted."""
    house = House(here)
    other = house.add(4, there)
    house.serve(other, kind, ME)
    refused = house.reach(house.guest, kind, ME, 4)
    allowed = here == there and here.profile is Profile.LEGACY and here.unrestricted
    assert (refused is None) == allowed
    if refused is not None:
        assert rule(refused) in (Rule.GUEST_TO_GUEST, Rule.DOMAIN, Rule.RESTRICTED)


@every_kind
def test_a_guest_and_its_parent(kind: EndpointKind) -> None:
    """A guest and its parent reach each other; two guests of one parent do not."""
    house = House(DEFAULT)
    first, second = house.add(4, DEFAULT), house.add(5, DEFAULT)
    first.parent = second.parent = house.guest.cid
    for context in (house.guest, first, second):
        house.serve(context, kind, ME)
    assert house.reach(first, kind, ME, house.guest.cid) is None
    assert house.reach(house.guest, kind, ME, 4) is None
    assert rule(house.reach(first, kind, ME, 5)) is Rule.GUEST_TO_GUEST


@every_kind
@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (DEFAULT, DEFAULT, Rule.GUEST_TO_GUEST),
        (legacy(unrestricted=True), DEFAULT, Rule.GUEST_TO_GUEST),
        (legacy("lab", unrestricted=True), legacy(unrestricted=True), Rule.DOMAIN),
        (legacy("lab"), legacy(), Rule.DOMAIN),
        (legacy(unrestricted=True), legacy(), Rule.RESTRICTED),
        (legacy(), legacy(), Rule.RESTRICTED),
    ],
    ids=str,
)
def test_the_rule_between_guests(
    here: Isolation, there: Isolation, expected: Rule, kind: EndpointKind
) -> None:
    for source, destination in ((here, there), (there, here)):
        house = House(source)
        house.serve(house.add(4, destination), kind, ME)
        assert rule(house.reach(house.guest, kind, ME, 4)) is expected


@every_kind
def test_no_privilege_of_a_program_joins_guests(kind: EndpointKind) -> None:
    house = House(RESTRICTED)
    house.serve(house.add(4, RESTRICTED), kind, ADMIN)
    for program in (ADMIN, ROOT, THE_OWNERS):
        assert rule(house.reach(house.guest, kind, program, 4)) is Rule.GUEST_TO_GUEST


@every_kind
@every_isolation
def test_a_forbidden_guest_answers_like_a_missing_one(
    isolation: Isolation, kind: EndpointKind
) -> None:
    """The errno is the same if the other guest listens, is suspended, in FT mode or off."""
    house = House(isolation)
    house.add(4, DEFAULT)
    house.serve(house.fabric.contexts.require(4), kind, ME)
    told = {code(house.reach(house.guest, kind, ME, cid)) for cid in (4, 99)}
    told.add(code(house.reach(house.guest, kind, ME, 4, PORT + 1)))
    other = house.fabric.contexts.require(4)
    other.fault_tolerant = True
    told.add(code(house.reach(house.guest, kind, ME, 4)))
    for state in type(other.state):
        other.state = state
        told.add(code(house.reach(house.guest, kind, ME, 4)))
    assert told == {"EHOSTUNREACH"}


@every_kind
def test_a_suspended_guest_gets_the_same_answer_for_both(kind: EndpointKind) -> None:
    house = House(DEFAULT)
    house.serve(house.add(4, DEFAULT), kind, ME)
    house.guest.state = type(house.guest.state).SUSPENDED
    assert {code(house.reach(house.guest, kind, ME, cid)) for cid in (4, 99)} == {"EHOSTUNREACH"}


# Between a guest and programs of the host

STRANGER, TRUSTED, OWNERS = "stranger", "CAP_NET_ADMIN", "the owner's"
PROGRAMS = {STRANGER: ME, TRUSTED: ADMIN, OWNERS: THE_OWNERS}

#: By the guest's isolation and the program: None, or the rule.  The host is in domain "".
HOST_TABLE = {
    (DEFAULT, STRANGER): None,
    (RESTRICTED, STRANGER): Rule.RESTRICTED,
    (legacy(), STRANGER): Rule.RESTRICTED,
    (legacy(unrestricted=True), STRANGER): None,
    (legacy("lab"), STRANGER): Rule.DOMAIN,
    (legacy("lab", unrestricted=True), STRANGER): Rule.DOMAIN,
    **{
        (isolation, who): Rule.DOMAIN if isolation.domain == "lab" else None
        for isolation, who in itertools.product(ISOLATIONS, [TRUSTED, OWNERS])
    },
}

host_table = pytest.mark.parametrize(("isolation", "who"), HOST_TABLE, ids=str)


@every_kind
@host_table
def test_from_a_guest_to_the_host(isolation: Isolation, who: str, kind: EndpointKind) -> None:
    house = House(isolation)
    house.serve(house.host, kind, PROGRAMS[who])
    refused = house.reach(house.guest, kind, ME, 2)
    expected = HOST_TABLE[isolation, who]
    assert rule(refused) is expected
    # To a guest, a forbidden destination answers as one without a listener.
    absent = house.reach(house.guest, kind, ME, 2, PORT + 1)
    assert code(refused) == ("allowed" if expected is None else code(absent))
    assert code(absent) == ("ECONNREFUSED" if kind is EndpointKind.DATAGRAM else "ECONNRESET")


@every_kind
@host_table
def test_from_the_host_to_a_guest(isolation: Isolation, who: str, kind: EndpointKind) -> None:
    """The verdict is the same whichever side connects; a program of the host gets the reason."""
    house = House(isolation)
    house.serve(house.guest, kind, ME)
    refused = house.reach(house.host, kind, PROGRAMS[who], 3)
    expected = HOST_TABLE[isolation, who]
    assert rule(refused) is expected
    assert code(refused) == ("allowed" if expected is None else "EACCES")


@every_kind
@pytest.mark.parametrize("unrestricted", [False, True])
def test_the_hosts_domains(kind: EndpointKind, unrestricted: bool) -> None:
    """ "Each host could belong to one or more VMCI domains"."""
    house = House(legacy("lab", unrestricted=unrestricted), frozenset({"office", "lab"}))
    house.serve(house.host, kind, ADMIN)
    house.serve(house.guest, kind, ME)
    assert house.reach(house.guest, kind, ME, 2) is None
    assert house.reach(house.host, kind, ADMIN, 3) is None
    default = House(legacy(unrestricted=unrestricted), frozenset({"office", "lab"}))
    default.serve(default.host, kind, ADMIN)
    assert rule(default.reach(default.guest, kind, ME, 2)) is Rule.DOMAIN


def test_domains_mean_nothing_outside_the_legacy_profile() -> None:
    """As of ESXi 5.1 "these options have no effect"."""
    house = House(Isolation(Profile.DEFAULT, False, "lab"))
    house.serve(house.host, EndpointKind.STREAM, ME)
    assert house.reach(house.guest, EndpointKind.STREAM, ME, 2) is None
    unrestricted = Isolation(Profile.DEFAULT, True, "lab")
    house = House(unrestricted)
    house.serve(house.add(4, unrestricted), EndpointKind.STREAM, ME)
    assert rule(house.reach(house.guest, EndpointKind.STREAM, ME, 4)) is Rule.GUEST_TO_GUEST
    house = House(Isolation(Profile.RESTRICTED, True))
    house.serve(house.host, EndpointKind.STREAM, ME)
    assert rule(house.reach(house.guest, EndpointKind.STREAM, ME, 2)) is Rule.RESTRICTED


def test_a_guests_programs_need_no_privilege_to_reach_trusted_endpoints() -> None:
    house = House(RESTRICTED)
    house.serve(house.host, EndpointKind.STREAM, ADMIN)
    for program in (ME, YOU, SERVICE):
        assert house.reach(house.guest, EndpointKind.STREAM, program, 2) is None


def test_new_isolation_applies_to_later_requests() -> None:
    house = House(DEFAULT)
    house.serve(house.host, EndpointKind.STREAM, ME)
    assert house.reach(house.guest, EndpointKind.STREAM, ME, 2) is None
    house.guest.isolation = RESTRICTED
    assert rule(house.reach(house.guest, EndpointKind.STREAM, ME, 2)) is Rule.RESTRICTED


# The hypervisor's services, CID 0


@every_kind
@every_isolation
def test_every_guest_reaches_the_hypervisors_services(
    isolation: Isolation, kind: EndpointKind
) -> None:
    house = House(isolation)
    house.serve(house.hypervisor, kind, ROOT)
    house.serve(house.guest, kind, ME)
    assert house.reach(house.guest, kind, ME, 0) is None
    assert house.reach(house.hypervisor, kind, ROOT, 3) is None
    house.serve(house.host, kind, ME)
    assert house.reach(house.host, kind, ME, 0) is None
    assert house.reach(house.hypervisor, kind, ROOT, 2) is None


@every_kind
@pytest.mark.parametrize("owner", [0, 1000])
def test_only_the_fabrics_owner_and_root_bind_on_cid_0(kind: EndpointKind, owner: int) -> None:
    fabric = Fabric(owner)
    hypervisor = fabric.contexts.hypervisor
    for number, program in enumerate((ME, YOU, SERVICE, ADMIN, ROOT)):
        if program.credentials.uid in (owner, 0):
            fabric.bind(hypervisor, kind, 0, PORT + number, program)
            continue
        with pytest.raises(Denied) as denied:
            fabric.bind(hypervisor, kind, 0, PORT + number, program)
        assert (denied.value.errno, denied.value.rule) == (errno.EACCES, Rule.HYPERVISOR_SERVICE)


def test_other_users_cannot_connect_from_cid_0() -> None:
    house = House(DEFAULT)
    listener = house.serve(house.guest, EndpointKind.STREAM, ME)
    with pytest.raises(Denied) as denied:
        house.fabric.connect(house.hypervisor, listener, None, BufferSizes(), YOU.credentials)
    assert (denied.value.errno, denied.value.rule) == (errno.EACCES, Rule.HYPERVISOR_SERVICE)
    assert house.fabric.connections == {}


# Within a context


@every_kind
@every_isolation
def test_processes_of_one_guest_may_communicate(isolation: Isolation, kind: EndpointKind) -> None:
    house = House(isolation)
    house.serve(house.guest, kind, ME)
    for cid in (3, 1):
        assert house.reach(house.guest, kind, YOU, cid) is None


@every_kind
def test_processes_of_the_host_may_communicate(kind: EndpointKind) -> None:
    house = House(RESTRICTED)
    house.serve(house.host, kind, ME)
    for cid in (2, 1):
        assert house.reach(house.host, kind, YOU, cid) is None


# Addresses


@every_kind
@pytest.mark.parametrize("cid", [0, 2, 4, 99])
def test_binding_to_another_contexts_cid_is_denied(kind: EndpointKind, cid: int) -> None:
    house = House(DEFAULT)
    house.add(4, DEFAULT)
    with pytest.raises(Denied) as denied:
        house.fabric.bind(house.guest, kind, cid, PORT, ADMIN)
    assert (denied.value.errno, denied.value.rule) == (errno.EADDRNOTAVAIL, Rule.AUTHENTIC_SOURCE)


@every_kind
@pytest.mark.parametrize("port", [0, 1023])
def test_reserved_ports_need_the_capability(kind: EndpointKind, port: int) -> None:
    house = House(DEFAULT)
    for program in (ME, ADMIN, ROOT):  # root without the capability is nobody special
        with pytest.raises(Denied) as denied:
            house.fabric.bind(house.guest, kind, 3, port, program)
        assert (denied.value.errno, denied.value.rule) == (errno.EACCES, Rule.RESERVED_PORT)
    assert house.fabric.bind(house.guest, kind, 3, port, SERVICE).port == port


@every_kind
def test_reserved_ports_in_a_guest_that_grants_them(kind: EndpointKind) -> None:
    house = House(DEFAULT)
    house.guest.reserved_ports = True
    for port, program in ((0, ME), (1023, ME), (22, ADMIN)):
        for privileged in (True, False):
            endpoint = house.fabric.bind(house.guest, kind, 3, port, program, 0, privileged)
            house.fabric.unbind(endpoint)
    with pytest.raises(Denied):
        house.fabric.bind(house.host, kind, 2, 22, ME)
    house.guest.reserved_ports = False
    with pytest.raises(Denied) as denied:  # who asks for another program has what that one has
        house.fabric.bind(house.guest, kind, 3, 22, SERVICE, 0, False)
    assert (denied.value.errno, denied.value.rule) == (errno.EACCES, Rule.RESERVED_PORT)


def test_a_refusals_text_has_the_error_and_the_reason() -> None:
    assert str(Refused(errno.EACCES, "because")) == "Permission denied: because"
