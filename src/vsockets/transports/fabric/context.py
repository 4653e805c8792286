"""What streams and datagrams of the fabric share."""

from __future__ import annotations

from ...attachment import Attachment
from ...socket import socket


class FabricSocket(socket):
    """A socket in a context of the fabric."""

    @property
    def _fabric(self) -> Attachment:
        place = self._attachment or self._context
        assert isinstance(place, Attachment)  # it is what chose this class
        return place
