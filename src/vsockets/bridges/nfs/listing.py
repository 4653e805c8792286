"""Listings of directories in an order that no change disturbs.

A name's cookie is a number computed from it, and a listing is in the order of cookies: it goes on
where it was, whatever came or went in between, and after the server was started again.
"""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict

from .acting import acting_as
from .exports import Identity
from .handles import Identifier, Signer
from .limits import NFS_LISTINGS
from .tree import Found

#: Cookies below are those of the beginning, and of the directory and its parent.
_FIRST_COOKIE = 3


class Listings:
    """The last listings, by directory and by its times."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._known: OrderedDict[tuple[Identifier, object], list[tuple[int, bytes]]]
        self._known = OrderedDict()
        #: Says whose cookies they are: they are good for as long as the key is.
        self.verifier = signer.number(b"", b"cookies").to_bytes(8)

    def after(
        self, folder: Found, cookie: int, identity: Identity
    ) -> tuple[list[tuple[int, bytes]], int]:
        """Cookies and names in ``folder``, and the place in them to go on from.  Raises OSError."""
        entries = self._entries(folder, identity)
        return entries, bisect.bisect_right(entries, (cookie, b"\xff" * 256))

    def _entries(self, folder: Found, identity: Identity) -> list[tuple[int, bytes]]:
        with acting_as(identity):
            fd = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            key = folder.identifier, (folder.state.mtime, folder.state.ctime)
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            names = [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)
        number = self._signer.number
        entries = [(1, b"."), (2, b"..")]
        entries += sorted((max(_FIRST_COOKIE, number(name, b"names")), name) for name in names)
        self._known[key] = entries
        if len(self._known) > NFS_LISTINGS:
            self._known.popitem(last=False)
        return entries
