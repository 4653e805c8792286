"""anyio over vSockets, on asyncio or trio: an ``anyio.abc.ByteStream``."""

import socket

import anyio.abc
import anyio.to_thread

import vsockets


async def connect(cid, port):
    """A stream to ``(cid, port)``."""
    sock = await anyio.to_thread.run_sync(vsockets.create_connection, (cid, port))
    # A plain socket: an established stream needs nothing of ours, and trio takes no subclass.
    return await anyio.abc.SocketStream.from_socket(socket.socket(fileno=sock.detach()))
