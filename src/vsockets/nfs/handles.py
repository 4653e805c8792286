"""File handles: their signatures, and the locations of the files they identify.

A handle contains an export, the inode of a file and its birth time, which distinguishes the file
from a later one with the same inode.  A handle is signed so that no guest can forge it, and valid
while the file exists, also under another name.

The server records where files are, to find a file by its handle: in an SQLite table, so that
handles stay valid across restarts.  A file can have several locations (links), and a location can
be outdated: the caller checks the file found there.  Each guest has its own rows, so that a guest
cannot evict another's handles.  Rows that cannot be written, as on a full disk, are kept in memory
until they can.  A journal beside the table has the cached replies (:mod:`.reply_journal`).
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import os
import secrets
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

from .limits import NFS_HANDLES_MAX, NFS_UNSAVED_HANDLES_MAX
from .reply_journal import ReplyJournal

_LAYOUT = struct.Struct(">QQqI")
_TAG_SIZE = 16
IDENTIFIER_SIZE = _LAYOUT.size
SIZE = IDENTIFIER_SIZE + _TAG_SIZE
KEY_SIZE = 32


class Identifier(NamedTuple):
    """A file's identity: the number of its export, its inode, and its birth time."""

    export: int
    ino: int
    btime: int
    btime_ns: int

    def pack(self) -> bytes:
        """Return the identity as bytes, whose order has no meaning."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Identifier:
        """Return the identity that :meth:`pack` has encoded."""
        return cls(*_LAYOUT.unpack(data))


class Signer:
    """A creator and verifier of handles, with a key known only to the server."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, identifier: Identifier) -> bytes:
        """Return the handle of a file."""
        packed = identifier.pack()
        return packed + self._tag(packed)

    def verify(self, handle: bytes) -> Identifier:
        """Return the file that a handle identifies.

        Raises ValueError if the signature is invalid.
        """
        packed, tag = handle[: _LAYOUT.size], handle[_LAYOUT.size :]
        if len(handle) != SIZE or not hmac.compare_digest(tag, self._tag(packed)):
            raise ValueError("invalid handle")
        return Identifier.unpack(packed)

    def keyed_number(self, data: bytes, context: bytes) -> int:
        """Return a 63-bit number derived from ``data``, unpredictable without the key."""
        tag = hashlib.blake2b(data, digest_size=8, key=self._key, person=context).digest()
        return int.from_bytes(tag) >> 1

    def _tag(self, packed: bytes) -> bytes:
        return hashlib.blake2b(
            packed, digest_size=_TAG_SIZE, key=self._key, person=b"handle"
        ).digest()


log = logging.getLogger("vsockets.nfs")

#: Seconds until writing is retried after an error, and rows written at a time.
_RETRY_SECONDS, _ROWS_PER_RETRY = 1.0, 100

_TABLE = (
    "CREATE TABLE IF NOT EXISTS places"
    " (file BLOB, folder BLOB, name BLOB, guest, PRIMARY KEY (file, folder, name, guest))"
)
_INDEX = "CREATE INDEX IF NOT EXISTS places_of_guests ON places (guest)"

_Row = tuple[bytes, bytes, bytes, Hashable]


class _LocationTable:
    """Locations on disk or in memory, at most ``rows_max``.  Every method raises sqlite3.Error."""

    def __init__(self, connection: sqlite3.Connection, rows_max: int) -> None:
        self._run = connection.execute
        self._rows_max = rows_max
        self._run(_TABLE)
        self._run(_INDEX)
        counts = self._run("SELECT guest, count(*) FROM places GROUP BY guest")
        self._counts: Counter[Hashable] = Counter(dict(counts.fetchall()))
        self._total = self._counts.total()

    def __len__(self) -> int:
        return self._total

    def add(self, row: _Row) -> None:
        if self._run("INSERT OR IGNORE INTO places VALUES (?, ?, ?, ?)", row).rowcount > 0:
            self._count(row[3], 1)
        while self._total > self._rows_max:
            ((guest, held),) = self._counts.most_common(1)
            oldest = "SELECT rowid FROM places WHERE guest = ? ORDER BY rowid LIMIT ?"
            some = max(1, min(self._rows_max // 100, held // 2))
            statement = f"DELETE FROM places WHERE rowid IN ({oldest})"
            self._count(guest, -self._run(statement, (guest, some)).rowcount)

    def locations(self, file: bytes) -> list[tuple[bytes, bytes]]:
        """Return the (directory, name) pairs where ``file`` may be, the newest first."""
        return self._run(
            "SELECT folder, name FROM places WHERE file = ?"
            " GROUP BY folder, name ORDER BY max(rowid) DESC",
            (file,),
        ).fetchall()

    def remove(self, *columns: Hashable) -> None:
        """Delete the rows whose first columns (file, directory, name, guest) are ``columns``."""
        names = ("file", "folder", "name", "guest")[: len(columns)]
        which = " AND ".join(f"{name} = ?" for name in names)
        select = f"SELECT guest, count(*) FROM places WHERE {which} GROUP BY guest"
        removed = self._run(select, columns).fetchall()
        self._run(f"DELETE FROM places WHERE {which}", columns)
        for guest, number in removed:
            self._count(guest, -number)

    def oldest(self, number: int) -> list[_Row]:
        return self._run("SELECT * FROM places ORDER BY rowid LIMIT ?", (number,)).fetchall()

    def _count(self, guest: Hashable, change: int) -> None:
        self._total += change
        self._counts[guest] += change
        if not self._counts[guest]:
            del self._counts[guest]


class HandleStore:
    """The locations in a state file, and the journal of replies; one server uses them exclusively.

    ``replies`` is the journal.
    """

    def __init__(self, path: str | os.PathLike[str], rows_max: int = NFS_HANDLES_MAX) -> None:
        """Open or create the state file.

        Raises OSError if that fails.
        """
        self._path = Path(path).absolute()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # 0600, because the file contains a secret key
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=0)
            try:
                self._prepare()  # locks the file
                self._disk = _LocationTable(self._connection, rows_max)
                self.replies = ReplyJournal(self._path.with_name(f"{self._path.name}-replies"))
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            problem = (
                f"{error}; each server needs its own file (--state), and free space on the disk"
            )
            raise OSError(f"{os.fspath(path)}: {problem}") from None
        self._memory = sqlite3.connect(":memory:", isolation_level=None)
        self._unsaved = _LocationTable(self._memory, NFS_UNSAVED_HANDLES_MAX)
        self._failing = False
        self._retry_at = 0.0

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = OFF")  # a lost row only makes a handle stale
        run("CREATE TABLE IF NOT EXISTS key (value BLOB)")
        if [row[1] for row in run("PRAGMA table_info(places)")] == ["file", "folder", "name"]:
            # A file from before rows had guests.
            run("BEGIN")
            run("ALTER TABLE places RENAME TO old_places")
            run(_TABLE)
            run("INSERT INTO places SELECT file, folder, name, '' FROM old_places ORDER BY rowid")
            run("DROP TABLE old_places")
            run("COMMIT")
        if run("SELECT value FROM key").fetchone() is None:
            run("INSERT INTO key VALUES (?)", (secrets.token_bytes(KEY_SIZE),))

    def __len__(self) -> int:
        return len(self._disk) + len(self._unsaved)

    def close(self) -> None:
        """Write the remaining rows and release the file for another server."""
        while len(self._unsaved) and self._save_some():
            pass
        if len(self._unsaved):
            text = "%s: %d locations could not be saved: handles of files there become stale"
            log.warning(text, self._path, len(self._unsaved))
        self._memory.close()
        self.replies.close()
        self._connection.close()

    @property
    def key(self) -> bytes:
        """The key that signs handles, created with the file."""
        (value,) = self._connection.execute("SELECT value FROM key").fetchone()
        assert isinstance(value, bytes)
        return value

    def locations(self, file: Identifier) -> Iterator[tuple[Identifier, bytes]]:
        """Yield the (directory, name) pairs where ``file`` may be, the newest first.

        Raises OSError if the state file cannot be read.
        """
        packed = file.pack()
        rows = self._unsaved.locations(packed) if len(self._unsaved) else []
        try:
            rows += self._disk.locations(packed)
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"{self._path}: {error}") from None
        for folder, name in rows:
            yield Identifier.unpack(folder), name

    def add(self, file: Identifier, folder: Identifier, name: bytes, guest: Hashable) -> None:
        """Record that ``guest`` knows ``file`` as ``name`` in ``folder``."""
        if len(self._unsaved) and time.monotonic() >= self._retry_at:
            self._save_some()
        row = file.pack(), folder.pack(), name, guest
        try:
            self._disk.add(row)
        except sqlite3.Error as error:
            self._note_failure(error)
            self._unsaved.add(row)

    def remove(self, file: Identifier, folder: Identifier, name: bytes) -> None:
        """Delete the record that ``file`` has the name ``name`` in ``folder``."""
        self._remove(file.pack(), folder.pack(), name)

    def forget(self, file: Identifier) -> None:
        """Delete all locations of ``file``, which has been removed."""
        self._remove(file.pack())

    def _remove(self, *columns: bytes) -> None:
        if len(self._unsaved):
            self._unsaved.remove(*columns)
        try:
            self._disk.remove(*columns)
        except sqlite3.Error as error:  # an outdated location is harmless
            self._note_failure(error)

    def _note_failure(self, error: sqlite3.Error) -> None:
        if not self._failing:
            text = "%s: %s; locations are kept in memory until they can be written"
            log.warning(text, self._path, error)
        self._failing = True
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _save_some(self) -> bool:
        """Write some rows that could not be written before; return False if they still cannot."""
        for row in self._unsaved.oldest(_ROWS_PER_RETRY):
            try:
                self._disk.add(row)
            except sqlite3.Error as error:
                self._note_failure(error)
                return False
            self._unsaved.remove(*row)
        if self._failing and not len(self._unsaved):
            self._failing = False
            log.warning("%s: writable again", self._path)
        return True
