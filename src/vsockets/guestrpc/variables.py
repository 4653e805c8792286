"""The ``guestinfo`` variables of all guests, in an SQLite file.

A guest has two sets: what the host has set, from its ``.vmx`` file and by command, and what the
guest has set itself.  A guest reads its own value before the host's, so it can redact a secret
("---"); the redaction is written before the guest gets its reply, and outlives the service.  A
guest's values never reach the ``.vmx`` file.
"""

from __future__ import annotations

import contextlib
import enum
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from .limits import (
    GUESTRPC_HOST_VARIABLES_MAX_BYTES,
    GUESTRPC_NAME_MAX_CHARACTERS,
    GUESTRPC_VARIABLES_MAX,
    GUESTRPC_VARIABLES_MAX_BYTES,
)

PREFIX = "guestinfo."

#: A name without ``guestinfo.``: what a ``.vmx`` file can contain.
_NAME = re.compile(r"""[!"$-<>-~]+""")

_LAYOUT = 1
_TABLES = """
CREATE TABLE guests (cid INTEGER PRIMARY KEY, identity TEXT NOT NULL, permissions TEXT NOT NULL
);
CREATE TABLE variables (
    cid INTEGER NOT NULL REFERENCES guests ON DELETE CASCADE,
    writer TEXT NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (cid, writer, name)
);
"""


class Writer(enum.Enum):
    """The side that has set a variable."""

    HOST = "host"
    GUEST = "guest"


class VariableRefused(ValueError):
    """A variable that cannot be set: its name is invalid, or a limit is reached."""


def full_name(text: str) -> str:
    """Return a name as it is stored: in lower case, with ``guestinfo.``.

    Raises VariableRefused if it is invalid.
    """
    name = text.lower()
    if not name.startswith(PREFIX):
        name = PREFIX + name
    rest = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(rest) or len(name) > GUESTRPC_NAME_MAX_CHARACTERS:
        expected = f"at most {GUESTRPC_NAME_MAX_CHARACTERS} printable ASCII characters"
        raise VariableRefused(f"{text[:60]!a}: expected {expected} without blank, = and #")
    return name


class Variables:
    """The variables of the guests that are enabled; a context manager.

    Methods that write have written when they return.  All raise sqlite3.Error when the file cannot
    be used, as on a full disk.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the file at ``path``; without one, keep the variables in memory.

        Raises sqlite3.Error, also for a file that is not such a database.
        """
        self._database = sqlite3.connect(path or ":memory:", timeout=1, isolation_level=None)
        try:
            self._run = self._database.execute
            self._run("PRAGMA foreign_keys = ON")
            # Another service with the same file would answer its own guests from it.
            self._run("PRAGMA locking_mode = EXCLUSIVE")
            self._run("PRAGMA journal_mode = WAL")
            (layout,) = self._run("PRAGMA user_version").fetchone()
            if layout == 0:
                self._database.executescript(
                    f"BEGIN; {_TABLES} PRAGMA user_version = {_LAYOUT}; COMMIT;"
                )
            elif layout != _LAYOUT:
                raise sqlite3.DatabaseError(f"layout {layout}, expected {_LAYOUT}")
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Variables:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; later calls raise sqlite3.Error."""
        self._database.close()

    # Guests

    def guests(self) -> dict[int, str]:
        """Return the enabled guests: their permissions, as text, by CID."""
        return dict(
            self._run("SELECT cid, permissions FROM guests WHERE permissions != '' ORDER BY cid")
        )

    def admit(
        self,
        cid: int,
        identity: str,
        permissions: str,
        values: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Enable a guest; ``values`` replace all that the host has set for it.

        ``identity`` distinguishes machines that have the CID one after the other, for example the
        path of the ``.vmx`` file: with another one, the guest starts without variables.  Returns
        False then.

        Raises VariableRefused when a limit would be exceeded; nothing has changed then.
        """
        with self._transaction():
            found = self._run("SELECT identity FROM guests WHERE cid = ?", (cid,)).fetchone()
            is_other = found is not None and found != (identity,)
            if is_other:
                self._run("DELETE FROM guests WHERE cid = ?", (cid,))
            self._run(
                "INSERT INTO guests VALUES (?, ?, ?)"
                " ON CONFLICT (cid) DO UPDATE SET permissions = excluded.permissions",
                (cid, identity, permissions),
            )
            if values is not None:
                self._replace(cid, values)
        return not is_other

    def retire(self, cid: int) -> None:
        """Disable a guest whose context was removed.

        Its variables stay for a machine with the same identity.  Without an identity they are
        removed: another guest may get the CID.
        """
        with self._transaction():
            self._run("DELETE FROM guests WHERE cid = ? AND identity = ''", (cid,))
            self._run("UPDATE guests SET permissions = '' WHERE cid = ?", (cid,))

    def remove(self, cid: int) -> bool:
        """Remove a guest with its variables; return whether it was enabled."""
        return self._run("DELETE FROM guests WHERE cid = ?", (cid,)).rowcount == 1

    # Variables

    def get(self, cid: int, name: str) -> bytes | None:
        """Return the value that the guest gets for ``name``, or None without one."""
        row = self._run(
            "SELECT value FROM variables WHERE cid = ? AND name = ? ORDER BY writer LIMIT 1",
            (cid, name),  # "guest" sorts before "host"
        ).fetchone()
        return None if row is None else bytes(row[0])

    def all(self, cid: int) -> list[tuple[str, Writer, bytes]]:
        """Return names, writers and values of a guest's variables, by name."""
        rows = self._run(
            "SELECT name, writer, value FROM variables WHERE cid = ? ORDER BY name, writer", (cid,)
        )
        return [(name, Writer(writer), bytes(value)) for name, writer, value in rows]

    def set(
        self, cid: int, writer: Writer, name: str, value: bytes, most: int | None = None
    ) -> None:
        """Set a variable; ``most`` is the limit in bytes of all that the writer has set.

        Raises VariableRefused when a limit would be exceeded.
        """
        with self._transaction():
            self._put(cid, writer, name, value)
            self._require_room(cid, writer, most)

    def unset(self, cid: int, name: str) -> bool:
        """Remove a variable, of both writers; return whether it existed."""
        removed = self._run("DELETE FROM variables WHERE cid = ? AND name = ?", (cid, name))
        return removed.rowcount > 0

    def _replace(self, cid: int, values: Mapping[str, bytes]) -> None:
        self._run("DELETE FROM variables WHERE cid = ? AND writer = ?", (cid, Writer.HOST.value))
        for name, value in values.items():
            self._put(cid, Writer.HOST, name, value)
        self._require_room(cid, Writer.HOST, None)

    def _put(self, cid: int, writer: Writer, name: str, value: bytes) -> None:
        self._run(
            "INSERT OR REPLACE INTO variables VALUES (?, ?, ?, ?)",
            (cid, writer.value, name, value),
        )

    def _require_room(self, cid: int, writer: Writer, most: int | None) -> None:
        if most is None:
            is_host = writer is Writer.HOST
            most = GUESTRPC_HOST_VARIABLES_MAX_BYTES if is_host else GUESTRPC_VARIABLES_MAX_BYTES
        number, size = self._run(
            "SELECT count(*), total(length(name) + length(value)) FROM variables"
            " WHERE cid = ? AND writer = ?",
            (cid, writer.value),
        ).fetchone()
        if number > GUESTRPC_VARIABLES_MAX:
            raise VariableRefused(f"{number} variables, expected at most {GUESTRPC_VARIABLES_MAX}")
        if size > most:
            raise VariableRefused(f"{size:.0f} bytes of variables, expected at most {most}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit what the with block writes, or none of it if it raises."""
        self._run("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")
