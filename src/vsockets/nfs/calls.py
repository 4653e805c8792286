"""The caller of an NFS call, and the results of a call that fails or takes several steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

from .exports import FileRef, Tree, UnixIdentity
from .handles import IDENTIFIER_SIZE as _IDENTIFIER_SIZE
from .handles import Identifier
from .nfs3 import Status


class NfsError(Exception):
    """A failed call whose NFS status has no counterpart in errno."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


class Caller(NamedTuple):
    """The caller of one NFS call: the export used, the rights, and the guest.

    A call that must not be performed twice calls ``begin`` before it changes a name: with the
    directory, the name, and the file that :class:`Change` describes.
    """

    tree: Tree
    identity: UnixIdentity
    guest: Hashable
    begin: Callable[[FileRef, bytes, FileRef | None], None]


class Change(NamedTuple):
    """The change that a call of ``procedure`` was about to make: of ``name`` in ``folder``.

    ``file`` is the file that REMOVE, RMDIR and RENAME take the name from, and that LINK gives it
    to; None for others, which make a new file.
    """

    procedure: int
    folder: Identifier
    name: bytes
    file: Identifier | None

    def pack(self) -> bytes:
        """Return the change as bytes."""
        file = bytes(_IDENTIFIER_SIZE) if self.file is None else self.file.pack()
        return self.procedure.to_bytes(4) + self.folder.pack() + file + self.name

    @classmethod
    def unpack(cls, data: bytes) -> Change:
        """Return the change that :meth:`pack` has encoded."""
        folder, file = data[4 : 4 + _IDENTIFIER_SIZE], data[4 + _IDENTIFIER_SIZE :]
        file, name = file[:_IDENTIFIER_SIZE], file[_IDENTIFIER_SIZE:]
        found = Identifier.unpack(file) if any(file) else None
        return cls(int.from_bytes(data[:4]), Identifier.unpack(folder), name, found)


class NotReady(Exception):
    """A signal that the call must be repeated when all ``steps`` are done."""

    def __init__(self, steps: Iterator[object]) -> None:
        super().__init__("not yet")
        self.steps = steps


class Pending(NamedTuple):
    """An unfinished call: ``finish`` returns the reply when ``steps`` are done or have failed."""

    steps: Iterator[object]
    finish: Callable[[OSError | None], bytes | Pending | None]
