"""VMware Tools that are played by this process as a guest of the fabric."""

from __future__ import annotations

import vsockets
from vsockets.attachment import Attachment
from vsockets.guestrpc.packets import Decoder, encode

from .vsock import PATIENCE


class PlayedTools:
    """A connection of a guest's tools."""

    def __init__(self, guest: Attachment, port: int, source: int = vsockets.VMADDR_PORT_ANY):
        self._sock = vsockets.socket(context=guest)
        self._sock.settimeout(PATIENCE)
        self._decoder = Decoder()
        if source != vsockets.VMADDR_PORT_ANY:
            self._sock.bind((vsockets.VMADDR_CID_ANY, source))
        self._sock.connect((0, port))

    def __enter__(self) -> PlayedTools:
        return self

    def __exit__(self, *error: object) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._sock.sendall(data)

    def receive(self) -> bytes:
        """Return the payload of the next packet, or b"" at the end."""
        while data := self._sock.recv(65_536):
            for packet in self._decoder.feed(data):
                return packet.payload
        return b""

    def ask(self, request: bytes) -> bytes:
        """Return the reply to a request."""
        self.send(encode(request))
        return self.receive()
