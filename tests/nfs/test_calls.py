"""The client's handling of replies, sent by a server of the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from vsockets.model.locator import Inet
from vsockets.nfs import nfs3, rpc
from vsockets.nfs.nfs3 import PROCEDURES, FsInfo, Status, Time
from vsockets.nfs.nfs_client import NfsClient, credentials
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
