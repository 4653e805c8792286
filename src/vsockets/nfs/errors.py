"""Whose call it is, and how one fails in NFS's own ways."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from .exports import Identity
from .nfs3 import Status
from .tree import Tree


class NfsError(Exception):
    """A status that is not one of unix's."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


class Caller(NamedTuple):
    """Whose rights a call has, in which export, and the guest it is from."""

    tree: Tree
    identity: Identity
    guest: Hashable
