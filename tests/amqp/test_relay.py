"""A relay whose two sides connect at different times."""

from __future__ import annotations

import asyncio
import socket

from vsockets.amqp.session import SessionRelay


def test_bytes_before_the_other_side_connects_are_kept() -> None:
    async def test() -> bytes:
        loop = asyncio.get_running_loop()
        relay = SessionRelay()
        (client, near), (far, broker) = socket.socketpair(), socket.socketpair()
        for sock in (client, near, far, broker):
            sock.setblocking(False)
        with client, broker:
            client.send(b"early")
            await loop.connect_accepted_socket(lambda: relay.near, near)
            for _ in range(3):  # turns in which the bytes could be read and lost
                await asyncio.sleep(0)
            await loop.connect_accepted_socket(lambda: relay.far, far)
            async with asyncio.timeout(30):
                said = await loop.sock_recv(broker, 100)
        relay.abort()
        await relay.done
        return said

    assert asyncio.run(test()) == b"early"
