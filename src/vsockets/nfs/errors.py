"""The caller of an NFS call, and the errors that have no errno value."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from .exports import Identity
from .nfs3 import Status
from .tree import Tree


class NfsError(Exception):
    """A failed call whose NFS status has no counterpart in errno."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


class Caller(NamedTuple):
    """The rights, the export and the guest of one call."""

    tree: Tree
    identity: Identity
    guest: Hashable
