"""Listening sockets: their errors, and the removal of socket files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.eventloop.asyncio_server import Listener, open_listener
from vsockets.model.locator import parse_locator
from vsockets.testing import PrivateFabric

NOBODY = 65_534


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("address", ["vsock::22", "vsock-dgram::22"])
def test_a_reserved_port_needs_a_capability(fabric: PrivateFabric, address: str) -> None:
    os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError) as caught:
            open_listener(parse_locator(address), fabric.host)
    finally:
        os.seteuid(0)
    assert str(caught.value.strerror) == (
        f"cannot listen on {parse_locator(address)}: Permission denied"
        " (ports below 1024 need CAP_NET_BIND_SERVICE)"
    )


def test_close_removes_the_socket_file_that_was_created(tmp_path: Path) -> None:
    """Another user may change the path while the listener is open."""
    home, secret = tmp_path / "home", tmp_path / "secret"
    home.mkdir()
    secret.mkdir()
    (secret / "x.sock").write_text("data")
    listener = Listener(parse_locator(f"unix:{home}/x.sock"))
    assert listener.where == f"{home}/x.sock"
    home.rename(tmp_path / "moved")
    home.symlink_to(secret)
    listener.close()
    assert (secret / "x.sock").exists()
    assert not (tmp_path / "moved" / "x.sock").exists()


def test_close_keeps_a_file_that_replaced_the_socket(tmp_path: Path) -> None:
    listener = Listener(parse_locator(f"unix:{tmp_path}/x.sock"))
    (tmp_path / "x.sock").unlink()
    (tmp_path / "x.sock").write_text("other data")
    listener.close()
    assert (tmp_path / "x.sock").exists()
