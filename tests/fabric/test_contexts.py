"""Adding, removing and leasing contexts, and the choice of CIDs."""

from __future__ import annotations

import errno

import pytest

from vsockets.fabric import Contexts, Refused

LAST_GUEST_CID = 2**32 - 2


def test_host_and_hypervisor_exist_from_the_start() -> None:
    contexts = Contexts(owner=1000)
    assert [context.cid for context in contexts] == [0, 2]
    assert contexts.get(2) is contexts.host
    assert contexts.get(0) is contexts.hypervisor
    assert not contexts.host.is_guest
    assert not contexts.hypervisor.is_guest
    assert contexts.host.owner == 1000
    assert len(contexts) == 2


def test_add_and_remove() -> None:
    contexts = Contexts(0)
    guest = contexts.add(7, "web", 1000, leased=True)
    assert (guest.cid, guest.name, guest.owner, guest.leased) == (7, "web", 1000, True)
    assert guest.is_guest
    assert contexts.get(7) is guest
    assert contexts.remove(7) is guest
    assert contexts.get(7) is None
    assert contexts.add(7, "", 0) is not guest


def test_a_guest_without_a_name_gets_one() -> None:
    assert Contexts(0).add(9, "", 0).name == "guest-9"


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 2**32 - 1, 2**32])
def test_cids_outside_the_guests_range_are_refused(cid: int) -> None:
    with pytest.raises(Refused) as refusal:
        Contexts(0).add(cid, "", 0)
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize("cid", [3, LAST_GUEST_CID])
def test_the_first_and_the_last_cid(cid: int) -> None:
    contexts = Contexts(0)
    contexts.add(cid, "", 0)
    with pytest.raises(Refused) as refusal:
        contexts.add(cid, "", 0)
    assert refusal.value.errno == errno.EEXIST


@pytest.mark.parametrize(("cid", "code"), [(3, errno.ENOENT), (0, errno.EINVAL), (2, errno.EINVAL)])
def test_host_hypervisor_and_unknown_contexts_cannot_be_removed(cid: int, code: int) -> None:
    contexts = Contexts(0)
    with pytest.raises(Refused) as refusal:
        contexts.remove(cid)
    assert refusal.value.errno == code
    assert len(contexts) == 2


def test_leased_cids_are_distinct_and_start_at_3() -> None:
    contexts = Contexts(0)
    contexts.add(4, "", 0)
    assert [contexts.add(None, "", 0).cid for _ in range(4)] == [3, 5, 6, 7]


def test_a_cid_is_not_leased_again_soon() -> None:
    contexts = Contexts(0)
    seen = set()
    for _ in range(1000):
        cid = contexts.add(None, "", 0).cid
        assert cid not in seen
        seen.add(cid)
        contexts.remove(cid)


def test_leasing_starts_over_after_the_last_cid() -> None:
    contexts = Contexts(0)
    contexts.following = LAST_GUEST_CID
    contexts.add(3, "", 0)
    assert [contexts.add(None, "", 0).cid for _ in range(2)] == [LAST_GUEST_CID, 4]
