"""Who may talk to whom: the profile of ESXi 5.1 and later (guide chapter 5)."""

from __future__ import annotations

import errno
import itertools

import pytest

from vsockets.fabric import Context, Refused
from vsockets.fabric.policy import require_path

HYPERVISOR, HOST, GUEST, OTHER = (Context(cid, "", 0) for cid in (0, 2, 3, 4))


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        pair
        for pair in itertools.product((HYPERVISOR, HOST, GUEST, OTHER), repeat=2)
        if set(pair) != {GUEST, OTHER}
    ],
)
def test_allowed(source: Context, destination: Context) -> None:
    require_path(source, destination, True)


@pytest.mark.parametrize(("source", "destination"), [(GUEST, OTHER), (OTHER, GUEST)])
def test_guest_to_guest_is_not(source: Context, destination: Context) -> None:
    with pytest.raises(Refused) as refusal:
        require_path(source, destination, True)
    assert refusal.value.errno == errno.EHOSTUNREACH
    assert "guest to guest" in refusal.value.reason


def test_a_refusal_says_both_the_error_and_the_rule() -> None:
    assert str(Refused(errno.EACCES, "because")) == "Permission denied: because"
