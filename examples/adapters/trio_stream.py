"""trio over vSockets: a ``trio.SocketStream``."""

import socket

import trio

import vsockets


async def connect(cid, port):
    """A stream to ``(cid, port)``."""
    sock = await trio.to_thread.run_sync(vsockets.create_connection, (cid, port))
    # A plain socket: an established stream needs nothing of ours, and trio takes no subclass.
    return trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=sock.detach())))
