"""The client's handling of replies, sent by a server of the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from vsockets.model.locator import Inet
from vsockets.nfs import nfs3, rpc
from vsockets.nfs.nfs3 import PROCEDURES, FsInfo, StableHow, Status, Time
from vsockets.nfs.nfs_client import NfsClient, WriteBack, credentials
from vsockets.nfs.rpc_client import RpcClient

AUTH = credentials(0, 0)


class ScriptedServer(asyncio.DatagramProtocol):
    """A server that replies to calls with ``replies``, in order."""

    def __init__(self, *replies: tuple[Status, Any]) -> None:
        self._replies = iter(replies)
        self.xids: list[int] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, source: Any) -> None:
        call, _ = rpc.decode_call(data)
        self.xids.append(call.xid)
        results = nfs3.encode_result(PROCEDURES[call.procedure], *next(self._replies))
        reply = rpc.encode_accepted(call.xid, rpc.AcceptStat.SUCCESS, results)
        self._transport.sendto(reply, source)


class HoldingServer(ScriptedServer):
    """A server of one file that replies once it has ``number`` calls, to the last one first."""

    def __init__(self, file: bytes, number: int) -> None:
        super().__init__()
        self._file, self._number = file, number
        self._calls: dict[int, tuple[bytes, Any]] = {}

    def datagram_received(self, data: bytes, source: Any) -> None:
        call, _ = rpc.decode_call(data)
        self._calls[call.xid] = data, source  # a retransmission is not another call
        if len(self._calls) < self._number:
            return
        for waiting, client in reversed(self._calls.values()):
            self._reply(waiting, client)
        self._calls.clear()

    def _reply(self, data: bytes, source: Any) -> None:
        call, arguments = rpc.decode_call(data)
        procedure = PROCEDURES[call.procedure]
        _, offset, size = procedure.arguments.unpack(arguments)
        part = self._file[offset : offset + size]
        content = None, len(part), offset + size >= len(self._file), part
        results = nfs3.encode_result(procedure, Status.OK, content)
        reply = rpc.encode_accepted(call.xid, rpc.AcceptStat.SUCCESS, results)
        self._transport.sendto(reply, source)


def call_server(server: ScriptedServer, ask: Callable[[NfsClient], Any]) -> Any:
    """Call ``ask`` with a client of ``server`` and return its result."""

    async def run() -> Any:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: server, ("127.0.0.1", 0), family=socket.AF_INET
        )
        _, port = transport.get_extra_info("sockname")
        client = RpcClient.connect(Inet("127.0.0.1", port, datagram=True))
        try:
            return await asyncio.wait_for(ask(NfsClient(client)), 60)
        finally:
            client.close()
            transport.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("offered", "negotiated"),
    [(8192, 8192), (65_536, 65_536), (1 << 20, nfs3.UDP_DATA_SIZE), (100, 512)],
)
def test_transfer_size_fits_server_and_transport(offered: int, negotiated: int) -> None:
    sizes = offered, offered, 512
    info = FsInfo(None, *sizes, *sizes, 4096, 1 << 40, Time(0, 1), 0)

    async def negotiate(nfs: NfsClient) -> int:
        await nfs.negotiate(AUTH, b"root")
        return nfs.transfer

    assert call_server(ScriptedServer((Status.OK, info)), negotiate) == negotiated


def test_busy_server_gets_a_new_call() -> None:
    server = ScriptedServer((Status.JUKEBOX, None), (Status.OK, (None, b"target")))
    result = call_server(server, lambda nfs: nfs.call(AUTH, "readlink", b"link"))
    assert result == (None, b"target")
    first, second = server.xids
    assert first != second  # with the same xid, the server would repeat its first reply


@pytest.mark.parametrize(
    ("size", "calls"), [(1000, 1), (1024, 1), (1025, 2), (2048, 2), (1600, 2), (4000, 2)]
)
def test_read_has_several_calls_in_flight(size: int, calls: int) -> None:
    """The server replies to none of two READs before it has both."""
    file = bytes(number % 251 for number in range(1600))

    async def read(nfs: NfsClient) -> bytes:
        nfs.transfer = 1024
        return bytes(await nfs.read(AUTH, b"file", 0, size))

    assert call_server(HoldingServer(file, calls), read) == file[:size]


def test_server_that_replies_with_less_than_asked_for() -> None:
    parts = [(None, 2, False, b"ab"), (None, 2, False, b"cd"), (None, 1, True, b"e")]
    server = ScriptedServer(*[(Status.OK, part) for part in parts])
    assert bytes(call_server(server, lambda nfs: nfs.read(AUTH, b"file", 0, 10))) == b"abcde"
    empty = ScriptedServer((Status.OK, (None, 0, False, b"")))
    assert bytes(call_server(empty, lambda nfs: nfs.read(AUTH, b"file", 0, 10))) == b""


def attributes_of(size: int) -> nfs3.Attributes:
    """Return the attributes of a regular file."""
    device, time = nfs3.DeviceNumber(0, 0), Time(1, 2)
    return nfs3.Attributes(
        nfs3.FileType.REGULAR, 0o644, 1, 0, 0, size, size, device, 7, 8, time, time, time
    )


def written(attributes: nfs3.Attributes | None, size: int) -> tuple[Status, Any]:
    """Return the reply to a WRITE of ``size`` bytes."""
    return Status.OK, (nfs3.WccData(None, attributes), size, StableHow.UNSTABLE, bytes(8))


def test_attributes_after_a_write_are_those_of_its_reply() -> None:
    """A file of another handle may have the same attributes: any change ends their validity."""

    async def write(nfs: NfsClient) -> list[nfs3.Attributes | None]:
        file, seen = WriteBack(nfs, b"file"), list[nfs3.Attributes | None]()

        def look() -> None:
            seen.append(file.attributes.attributes if file.attributes is not None else None)

        look()
        await file.write(AUTH, 0, b"abc")
        look()
        await file.write(AUTH, 3, b"de")
        look()
        await nfs.call(AUTH, "readlink", b"link")
        look()
        await nfs.call(AUTH, "remove", nfs3.Target(b"folder", b"another name of the file"))
        look()
        await file.write(AUTH, 5, b"f")
        look()
        return seen

    server = ScriptedServer(
        *(written(attributes_of(3), 3), written(attributes_of(5), 2)),
        (Status.OK, (None, b"target")),
        *((Status.OK, nfs3.WccData()), written(None, 1)),
    )
    three, five = attributes_of(3), attributes_of(5)
    assert call_server(server, write) == [None, three, five, five, None, None]


def test_attributes_of_writes_at_once_are_not_used() -> None:
    """The server may have performed either one last."""

    async def write(nfs: NfsClient) -> bool:
        nfs.transfer = 1024
        file = WriteBack(nfs, b"file")
        await file.write(AUTH, 0, bytes(2048))
        return file.attributes is None

    replies = [written(attributes_of(size), 1024) for size in (1024, 2048)]
    assert call_server(ScriptedServer(*replies), write)
