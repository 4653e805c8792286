"""Ends of records (MSG_EOR) on sequenced-packet sockets: unix sockets do not carry them.

A message that ends a record is sent together with a descriptor, the *marker*; AF_VSOCK carries no
descriptors otherwise.  The receiver does not get it: MSG_CTRUNC shows that a message had one.
"""

from __future__ import annotations

import array
import errno
import os
from contextlib import closing
from socket import MSG_DONTWAIT, MSG_EOR, MSG_NOSIGNAL, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET

from ...socket import Phase
from ..call import Answer, Call, failure
from ..memory import Message
from ..scheduler import WRITABLE, ready
from ..sockets import Endpoint

#: Seconds between two checks whether a call that waits for room still waits.
_LOOK = 0.25


async def send(call: Call, endpoint: Endpoint, message: Message, flags: int) -> Answer:
    """Send a message that ends a record; let the kernel send any other."""
    is_ours = endpoint.type == SOCK_SEQPACKET and endpoint.phase is Phase.CONNECTED
    if not is_ours or not flags & MSG_EOR:
        call.let_through()
        return None
    if message.size > endpoint.buffers.size:
        raise failure(errno.EMSGSIZE)
    data = message.read(call)
    marker = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [call.services.marker]))]
    with closing(call.duplicate(endpoint)) as sock:
        waits = not flags & MSG_DONTWAIT and os.get_blocking(sock.fileno())
        while True:
            try:
                return sock.sendmsg([data], marker, MSG_DONTWAIT | MSG_NOSIGNAL)
            except BlockingIOError:
                if not waits:
                    raise
            except BrokenPipeError:
                # Nothing can be sent any longer; the kernel raises SIGPIPE where due.
                call.let_through()
                return None
            await ready(sock.fileno(), _LOOK, WRITABLE)
            call.check()
