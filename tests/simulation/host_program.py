"""The host's end of a simulated stream to a device, and the program that has it."""

from __future__ import annotations

from .simulated_sockets import SimulatedSocket, pattern

#: The bit of a guest's shutdown for "sends nothing more", the same in the packets of both devices.
_SEND = 2


class HostProgram:
    """The program of the host, and what it may expect of its guest."""

    def __init__(self) -> None:
        #: bytes may be lost in this direction: a fault, or the receiving program has closed
        self.to_guest_may_end = self.to_host_may_end = False
        self.sock: SimulatedSocket | None = None
        self.host_wrote = self.host_read = 0
        self.host_ended = False  #: it has read the end
        self.host_finished = False  #: it writes nothing more
        # The guest's program.
        self.guest_wrote = self.guest_read = 0
        self.peer_shutdown = self.own_shutdown = 0

    def excuse(self) -> None:
        """Allow the stream to end at any time."""
        self.to_guest_may_end = self.to_host_may_end = True

    def read(self, length: int) -> None:
        """Read up to ``length`` bytes, or the end, and check them."""
        assert self.sock is not None
        try:
            data = self.sock.recv(length)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data and not self.host_ended:
            self.host_ended = True
            whole = self.host_read == self.guest_wrote
            ended = self.own_shutdown & _SEND and whole
            assert self.to_host_may_end or ended, "an end without reason"
        assert data == pattern(self.host_read, len(data)), "bytes lost or out of order"
        self.host_read += len(data)
