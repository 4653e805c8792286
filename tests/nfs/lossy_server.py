"""A server whose socket loses datagrams in both directions.

Arguments: EXPORT STATE PORT SEED PERCENT.
"""

from __future__ import annotations

import asyncio
import random
import socket as stdlib
import sys
from pathlib import Path
from typing import Any, cast

from vsockets.model.locator import Vsock
from vsockets.nfs import server
from vsockets.nfs.exports import Export
from vsockets.nfs.handles import HandleStore
from vsockets.nfs.service import NfsService

export, state, port, seed, percent = sys.argv[1:]
chance = random.Random(int(seed))


class LossySocket:
    def __init__(self, sock: stdlib.socket) -> None:
        self._sock = sock

    def recvfrom(self, size: int) -> tuple[bytes, Any]:
        while True:
            received = self._sock.recvfrom(size)
            if chance.random() * 100 >= int(percent):
                return received

    def sendto(self, data: bytes, address: Any) -> int:
        if chance.random() * 100 < int(percent):
            return len(data)
        return self._sock.sendto(data, address)


class LossyServer(server.NfsServer):
    def _receive(self, sock: stdlib.socket) -> None:
        super()._receive(cast(stdlib.socket, LossySocket(sock)))


server.NfsServer = LossyServer  # type: ignore[misc]
service = NfsService([Export.parse(export)], HandleStore(Path(state)))
locators = [Vsock(2, int(port), datagram=True)]
asyncio.run(server.serve(service, locators, None, lambda _: print("ready", flush=True)))
