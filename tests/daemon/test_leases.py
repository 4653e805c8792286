"""CIDs that exist as long as their leases."""

from __future__ import annotations

import errno

import pytest

from vsockets.control import Control
from vsockets.testing import PrivateFabric, wait_until


def cids(fabric: PrivateFabric) -> set[int]:
    return {context["cid"] for context in fabric.control.contexts()}


def test_a_lease_ends_with_its_connection(vsock_fabric: PrivateFabric) -> None:
    with Control(vsock_fabric.folder) as control:
        leased = control.add_context(lease=True)["cid"]
        kept = control.add_context()["cid"]
        assert {leased, kept} < cids(vsock_fabric)
    wait_until(lambda: leased not in cids(vsock_fabric), "the end of the lease")
    assert kept in cids(vsock_fabric)


def test_a_shared_lease_ends_with_the_last(vsock_fabric: PrivateFabric) -> None:
    with Control(vsock_fabric.folder) as first, Control(vsock_fabric.folder) as second:
        cid = first.add_context(5, lease=True)["cid"]
        assert second.add_context(5, lease=True)["cid"] == cid
        first.close()
        # Its end is read before the next question of the same batch, or a little later.
        wait_until(lambda: vsock_fabric.control.status()["contexts"] == 2, "two contexts")
        assert cid in cids(vsock_fabric)
    wait_until(lambda: cid not in cids(vsock_fabric), "the end of the last lease")


def test_a_guest_without_leases_cannot_be_leased(vsock_fabric: PrivateFabric) -> None:
    vsock_fabric.guest(5)
    with Control(vsock_fabric.folder) as control, pytest.raises(OSError) as caught:
        control.add_context(5, lease=True)
    assert caught.value.errno == errno.EEXIST
