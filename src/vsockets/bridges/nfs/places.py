"""Where files are: what a server has to remember to find a file by its handle.

A table in SQLite, so that handles outlive the server.  A file can have several places (links),
and a place can be out of date: who finds a file there checks it.  Another table has what the last
server answered, for the next one.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator

from .duplicates import Answer
from .handles import KEY_SIZE, Identifier
from .limits import NFS_PLACES


class Places:
    """The table, in a file that one server has for itself."""

    def __init__(self, path: str | os.PathLike[str], most: int = NFS_PLACES) -> None:
        """Raises OSError."""
        self._most = most
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, mode=0o700, exist_ok=True)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # the key is nobody's business
            self._table = sqlite3.connect(path, isolation_level=None, timeout=0)
            try:
                self._count = self._prepare()
            except BaseException:
                self._table.close()
                raise
        except sqlite3.Error as error:
            why = f"{os.fspath(path)}: {error}; each server needs a file of its own (--state)"
            raise OSError(why) from None

    def _prepare(self) -> int:
        """Make the tables where they are missing, and return the number of places."""
        run = self._table.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = OFF")  # a lost row makes a handle stale, no more
        run("CREATE TABLE IF NOT EXISTS key (value BLOB)")
        run(
            "CREATE TABLE IF NOT EXISTS places"
            " (file BLOB, folder BLOB, name BLOB, PRIMARY KEY (file, folder, name))"
        )
        run(
            "CREATE TABLE IF NOT EXISTS answers"
            " (source TEXT, xid INTEGER, digest INTEGER, reply BLOB)"
        )
        if run("SELECT value FROM key").fetchone() is None:
            run("INSERT INTO key VALUES (?)", (secrets.token_bytes(KEY_SIZE),))
        count: int
        (count,) = run("SELECT count(*) FROM places").fetchone()
        return count

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Another server may have the file."""
        self._table.close()

    @property
    def key(self) -> bytes:
        """What handles are signed with; made with the table."""
        (value,) = self._table.execute("SELECT value FROM key").fetchone()
        assert isinstance(value, bytes)
        return value

    def of(self, file: Identifier) -> Iterator[tuple[Identifier, bytes]]:
        """Folders and names in them, where ``file`` may be; the last told first."""
        rows = self._table.execute(
            "SELECT folder, name FROM places WHERE file = ? ORDER BY rowid DESC", (file.pack(),)
        ).fetchall()
        for folder, name in rows:
            yield Identifier.unpack(folder), name

    def add(self, file: Identifier, folder: Identifier, name: bytes) -> None:
        """``file`` is there."""
        row = file.pack(), folder.pack(), name
        self._count += self._table.execute(
            "INSERT OR IGNORE INTO places VALUES (?, ?, ?)", row
        ).rowcount
        if self._count > self._most:
            oldest = "SELECT rowid FROM places ORDER BY rowid LIMIT ?"
            self._count -= self._table.execute(
                f"DELETE FROM places WHERE rowid IN ({oldest})", (max(1, self._most // 100),)
            ).rowcount

    def remove(self, file: Identifier, folder: Identifier, name: bytes) -> None:
        """``file`` is there no longer."""
        row = file.pack(), folder.pack(), name
        self._count -= self._table.execute(
            "DELETE FROM places WHERE file = ? AND folder = ? AND name = ?", row
        ).rowcount

    def forget(self, file: Identifier) -> None:
        """``file`` is no more."""
        self._count -= self._table.execute(
            "DELETE FROM places WHERE file = ?", (file.pack(),)
        ).rowcount

    def keep_answers(self, answers: Iterable[Answer]) -> None:
        """For the next server."""
        rows = ((json.dumps(answer.source), *answer[1:]) for answer in answers)
        self._table.execute("BEGIN")
        self._table.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", rows)
        self._table.execute("COMMIT")

    def take_answers(self) -> Iterator[Answer]:
        """What the last server kept; once, as a later one's would be older than what it did."""
        rows = self._table.execute("SELECT * FROM answers ORDER BY rowid").fetchall()
        self._table.execute("DELETE FROM answers")
        for source, *rest in rows:
            yield Answer(tuple(json.loads(source)), *rest)
