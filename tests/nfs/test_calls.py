"""What a client makes of a server's answers; the server is a socket that a test answers on."""

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

WHO = credentials(0, 0)


class Answering(asyncio.DatagramProtocol):
    """A server; ``answers`` are what calls get, one after the other."""

    def __init__(self, *answers: tuple[Status, Any]) -> None:
        self._answers = iter(answers)
        self.xids: list[int] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, source: Any) -> None:
        call, _ = rpc.decode_call(data)
        self.xids.append(call.xid)
        results = nfs3.encode_result(PROCEDURES[call.procedure], *next(self._answers))
        reply = rpc.encode_accepted(call.xid, rpc.Accepted.SUCCESS, results)
        self._transport.sendto(reply, source)


def asking(server: Answering, ask: Callable[[NfsClient], Any]) -> Any:
    """What ``ask`` returns that is given a client of ``server``."""

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
    ("offered", "agreed"),
    [(8192, 8192), (65_536, 65_536), (1 << 20, nfs3.UDP_DATA_SIZE), (100, 512)],
)
def test_transfers_fit_the_server_and_the_way(offered: int, agreed: int) -> None:
    sizes = offered, offered, 512
    info = FsInfo(None, *sizes, *sizes, 4096, 1 << 40, Time(0, 1), 0)

    async def agree(nfs: NfsClient) -> int:
        await nfs.agree(WHO, b"root")
        return nfs.transfer

    assert asking(Answering((Status.OK, info)), agree) == agreed


def test_a_server_that_is_busy_is_asked_anew() -> None:
    server = Answering((Status.JUKEBOX, None), (Status.OK, (None, b"target")))
    result = asking(server, lambda nfs: nfs.call(WHO, "readlink", b"link"))
    assert result == (None, b"target")
    first, second = server.xids
    assert first != second  # else it would be the answer to the first that is given again
