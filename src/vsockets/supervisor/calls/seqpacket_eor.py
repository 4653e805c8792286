"""Ends of records on sequenced-packet sockets: MSG_EOR, which unix sockets do not carry.

A message that ends a record is sent with a descriptor riding along, which AF_VSOCK cannot carry
otherwise.  The receiver is not given it: that a message had one is told by MSG_CTRUNC.
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

#: How often it is looked whether a call that waits for room still waits, in seconds.
_LOOK = 0.25


async def send(call: Call, endpoint: Endpoint, message: Message, flags: int) -> Answer:
    """Send a message that may end a record; the kernel can send all others as well."""
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
                # The kernel raises SIGPIPE where it is due: nothing will be sent now either.
                call.let_through()
                return None
            await ready(sock.fileno(), _LOOK, WRITABLE)
            call.check()
