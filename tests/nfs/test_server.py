"""The server's sockets and the turns of guests."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets.attachment import Attachment
from vsockets.model.locator import parse_locator
from vsockets.nfs import limits, listing, mount_protocol, nfs3, rpc
from vsockets.nfs.calls import Pending
from vsockets.nfs.exports import Export
from vsockets.nfs.handles import HandleStore
from vsockets.nfs.nfs3 import NUMBERS, PROCEDURES
from vsockets.nfs.nfs_client import credentials
from vsockets.nfs.server import NfsServer
from vsockets.nfs.service import NfsService
from vsockets.testing import PrivateFabric

PATIENCE = 20.0


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


class RecordingService(NfsService):
    """A service that records the guests of its replies in order."""

    answered: list[Any]

    def answer(self, data: bytes, source: tuple[Any, ...]) -> bytes | Pending | None:
        reply = super().answer(data, source)
        if isinstance(reply, bytes):
            self.answered.append(source[0])
        return reply


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RecordingService]:
    (tmp_path / "export").mkdir()
    handle_store = HandleStore(tmp_path / "state")
    service = RecordingService(
        [Export.parse(f"{tmp_path / 'export'},no-root-squash")], handle_store
    )
    service.answered = []
    yield service
    service.close()
    handle_store.close()


class Client:
    """A guest that sends without waiting for replies."""

    def __init__(self, guest: Attachment) -> None:
        self.cid = guest.cid
        self.sock = vsockets.socket(type=socket.SOCK_DGRAM, context=guest)
        self.sock.setblocking(False)
        self._xid = 0

    def send(self, program: int, number: int, packed: bytes) -> bool:
        self._xid += 1
        own = credentials(os.geteuid(), os.getegid())
        call = rpc.CallHeader(self._xid, 2, program, 3, number, own, rpc.NO_AUTH)
        try:
            self.sock.sendto(rpc.encode_call(call, packed), (2, 2049))
        except OSError:  # the queue is full
            return False
        return True

    async def receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        return bytes(rpc.decode_reply(await loop.sock_recv(self.sock, 70_000)))


async def serve(service: NfsService, fabric: PrivateFabric) -> NfsServer:
    return NfsServer(service, [parse_locator("vsock-dgram::2049")], fabric.host)


def test_client_that_floods_the_server_delays_no_other(service: RecordingService) -> None:
    """Over UDP, which fits more calls into the server's queue; clients differ by host address."""

    async def main() -> None:
        server = NfsServer(service, [parse_locator("udp:127.0.0.1:0")])
        target = server.listeners[0].sockets[0].getsockname()
        call = rpc.CallHeader(1, 2, mount_protocol.PROGRAM, 3, 0, rpc.NO_AUTH, rpc.NO_AUTH)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as greedy,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
        ):
            greedy.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.2", 0))
            for _ in range(2 * limits.NFS_GUEST_WAITING_CALLS_MAX):
                greedy.sendto(rpc.encode_call(call, b""), target)
            other.sendto(rpc.encode_call(call, b""), target)
            other.setblocking(False)
            await asyncio.get_running_loop().sock_recv(other, 70_000)
            while len(service.answered) < limits.NFS_GUEST_WAITING_CALLS_MAX + 1:
                await asyncio.sleep(0)
        server.close()
        assert service.answered[:2] == ["127.0.0.1", "127.0.0.2"]
        assert len(service.answered) == limits.NFS_GUEST_WAITING_CALLS_MAX + 1

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_listing_of_a_large_directory_delays_no_other_guest(
    service: RecordingService,
    fabric: PrivateFabric,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "NFS_NAMES_PER_STEP_MAX", 1)
    for number in range(500):
        (tmp_path / "export" / str(number)).touch()

    async def main() -> None:
        server = await serve(service, fabric)
        lister, other = Client(fabric.guest()), Client(fabric.guest())
        with lister.sock, other.sock:
            packed = mount_protocol.path.pack(os.fsencode(tmp_path / "export"))
            lister.send(mount_protocol.PROGRAM, mount_protocol.MNT, packed)
            root = mount_protocol.mount_result.unpack(await lister.receive())[1][0]
            procedure = PROCEDURES[NUMBERS["readdir"]]
            packed = procedure.arguments.pack((root, 0, bytes(8), 65_000))
            lister.send(nfs3.PROGRAM, NUMBERS["readdir"], packed)
            for _ in range(100):  # all of them are answered before the listing is complete
                other.send(mount_protocol.PROGRAM, 0, b"")
                await other.receive()
            with pytest.raises(BlockingIOError):
                lister.sock.recv(70_000)
            _, (_, _, entries, end) = nfs3.decode_result(procedure, await lister.receive())
            assert end and len(entries) == 502
        server.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
