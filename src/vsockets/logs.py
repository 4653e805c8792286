"""Logging of long-running programs to standard error, as text or one JSON object per line.

Under systemd, standard error is the journal, which reads a line's priority from a number in angle
brackets before it (``sd-daemon(3)``).

Clients can cause any number of lines, and choose parts of their text.  So all lines except notices
are rate limited, for each *party* (a guest, a user or a peer; by default, the line of source code)
and in total; a line states how many lines of its party were omitted before it.  All characters are
printable.  Name the party with::

    log.warning("%s: %s", who, error, extra=logs.by(party))
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from .limits import LOG_FILE_MAX_BYTES, LOG_LINES_PER_SECOND, LOG_PARTIES_MAX
from .model.rates import TokenBucket
from .model.text import printable

#: Level of messages that are always logged and are not warnings, such as listening addresses.
NOTICE = 25
logging.addLevelName(NOTICE, "NOTICE")

#: The formats of logs.
FORMATS = ("text", "json")

_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    NOTICE: 5,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


def by(party: Hashable) -> dict[str, Any]:
    """Return the ``extra`` argument of a log call whose line is caused by ``party``."""
    return {"party": party}


def rare(party: Hashable) -> dict[str, Any]:
    """Return the ``extra`` argument of a log call limited to one line per second of ``party``."""
    return {"party": party, "rate": 1}


class Throttle:
    """A rate limiter with a token bucket for each party and one for all parties together.

    The least recently active parties are forgotten.  The total is limited because there can be
    more parties than are remembered: a user may have thousands of user ids.
    """

    def __init__(self, rate: int) -> None:
        """Allow ``rate`` events per second for each party, ten times as many for all parties."""
        self.rate = rate
        self._all = TokenBucket(10 * rate)
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def admit(self, party: Hashable, rate: int | None = None) -> int | None:
        """Decide about an event of ``party`` that happens now.

        Returns None if the caller has to omit the event; otherwise the number of the party's events
        omitted since the last admitted one.  ``rate`` replaces the common rate, per second.
        """
        rate = rate or self.rate
        bucket = self._buckets.get(party)
        if bucket is None or bucket.tokens.rate != rate:
            bucket = self._buckets[party] = _Bucket(rate)
            if len(self._buckets) > LOG_PARTIES_MAX:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(party)
        if self._all.rate != 10 * self.rate:
            self._all = TokenBucket(10 * self.rate)
        now = monotonic()
        if not (bucket.tokens.try_take(now) and self._all.try_take(now)):
            bucket.left_out += 1
            return None
        left_out, bucket.left_out = bucket.left_out, 0
        return left_out


class _Bucket:
    """The tokens of one party, and its number of omitted events."""

    __slots__ = ("left_out", "tokens")

    def __init__(self, rate: int) -> None:
        self.tokens = TokenBucket(rate)
        self.left_out = 0


class _Limit(logging.Filter):
    """A filter that omits records of parties that cause too many."""

    def __init__(self) -> None:
        super().__init__()
        self._throttle = Throttle(LOG_LINES_PER_SECOND)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == NOTICE or getattr(record, "admitted", False):
            return True
        place = record.pathname, record.lineno
        party = getattr(record, "party", place)
        # A record with a traceback counts as twenty lines.
        rate = getattr(record, "rate", 1 if record.exc_info else None)
        left_out = self._throttle.admit(party if rate is None else (party, place), rate)
        record.left_out = left_out
        return left_out is not None


class _Text(logging.Formatter):
    """A formatter of one line per record, followed by a traceback with marked lines."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = printable(" ".join(record.getMessage().split()))
        if left_out := getattr(record, "left_out", 0):
            record.message += f" ({left_out} more were left out)"
        lines = [self.formatMessage(record)]
        if record.exc_info:
            traceback = self.formatException(record.exc_info).split("\n")
            lines += [f"| {printable(line)}" for line in traceback]
        return "\n".join(lines)


class _JSON(logging.Formatter):
    """A formatter of one JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if left_out := getattr(record, "left_out", 0):
            line["left_out"] = left_out
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Prefixed(logging.Formatter):
    """A formatter that puts the journal's priority before each line of another formatter."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in self._inner.format(record).split("\n"))


class _Handler(logging.StreamHandler[TextIO]):
    """A handler that writes to standard error, and limits the file's size if that is a file."""

    _file: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self._file is not None and os.fstat(2).st_size >= LOG_FILE_MAX_BYTES:
            try:
                os.replace(self._file, older(self._file))
                self.write_to(self._file)
            except OSError:  # the folder was removed, or descriptors are exhausted: discard the log
                os.ftruncate(2, 0)

    def write_to(self, path: Path, keep: bool = False) -> None:
        """Create the file, and make it this process's standard output and error.

        An existing file is truncated, unless ``keep`` is True.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        flags |= 0 if keep else os.O_TRUNC
        sink = os.open(path, flags, 0o600)
        for number in (1, 2):
            os.dup2(sink, number)
        os.close(sink)
        self._file = path


_handler = _Handler()


def configure(words: str, level: int, form: str) -> None:
    """Log records of at least ``level`` to standard error.

    ``form`` is one of FORMATS, and ``words`` the format of a line of text (``logging.Formatter``).
    """
    formatter: logging.Formatter = _JSON() if form == "json" else _Text(words)
    if _is_journal():
        formatter = _Prefixed(formatter)
    _handler.setStream(sys.stderr)
    _handler.setFormatter(formatter)
    _handler.filters = [_Limit()]
    logging.basicConfig(level=level, handlers=[_handler])


def write_to(path: Path, keep: bool = False) -> None:
    """Replace standard output and error with the file ``path``, emptied unless ``keep`` is True.

    When the file has LOG_FILE_MAX_BYTES, it is renamed to the path that :func:`older` returns, and
    a new file is created.  Together the two have at most twice as many bytes.
    """
    _handler.write_to(path, keep)


def older(path: Path) -> Path:
    """Return the path of the log that precedes the log ``path``."""
    return path.with_name(f"{path.name}.1")


def _is_journal() -> bool:
    """Return whether standard error is the journal: JOURNAL_STREAM then has the file's inode."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
