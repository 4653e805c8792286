"""The caller of an NFS call, and the results of a call that fails or takes several steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

from .exports import Tree, UnixIdentity
from .nfs3 import Status


class NfsError(Exception):
    """A failed call whose NFS status has no counterpart in errno."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


class Caller(NamedTuple):
    """The caller of one NFS call: the export used, the rights, and the guest."""

    tree: Tree
    identity: UnixIdentity
    guest: Hashable


class NotReady(Exception):
    """A signal that the call must be repeated when all ``steps`` are done."""

    def __init__(self, steps: Iterator[object]) -> None:
        super().__init__("not yet")
        self.steps = steps


class Pending(NamedTuple):
    """An unfinished call: ``finish`` returns the reply when ``steps`` are done or have failed."""

    steps: Iterator[object]
    finish: Callable[[OSError | None], bytes | Pending | None]
