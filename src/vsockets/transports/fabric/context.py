"""The base class of the fabric's sockets."""

from __future__ import annotations

from ...attachment import Attachment
from ...socket import socket


class FabricSocket(socket):
    """A socket in a context of the fabric."""

    @property
    def _fabric(self) -> Attachment:
        handle = self._attachment or self._context
        assert isinstance(handle, Attachment)  # the class was chosen by it
        return handle
