"""Logs of programs that run for long, on standard error: text, or a JSON object a line.

Under systemd standard error is the journal, which takes a line's priority from a number in
angle brackets before it (``sd-daemon(3)``).

Clients cause lines, as often as they like, and choose parts of their text.  So every line but a
notice is limited: each *party* (a guest, a user, a peer, or where none is named the place in the
source) may cause some lines a second, all together some more, and a line tells how many of its
party were left out before it.  No line contains a control character, or another that is not
printed.  Name the party so::

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
from .model.rate_limit import TokenBucket
from .model.text import printable

#: What is said however little was asked for, and no warning: where somebody listens.
NOTICE = 25
logging.addLevelName(NOTICE, "NOTICE")

#: How logs may be written.
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
    """Return the ``extra`` of a line that ``party`` has caused."""
    return {"party": party}


def rare(party: Hashable) -> dict[str, Any]:
    """As :func:`by`, for a line that is the same each time: one a second is enough."""
    return {"party": party, "rate": 1}


class Throttle:
    """Limits how often parties may cause something, with a token bucket for each.

    Those longest silent are forgotten; and because there can be more parties than are remembered
    (a user may have thousands of user ids), all together are limited, too.
    """

    def __init__(self, rate: int) -> None:
        """``rate``: a second and party; ten times that for all parties."""
        self.rate = rate
        self._all = TokenBucket(10 * rate)
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def admit(self, party: Hashable, rate: int | None = None) -> int | None:
        """Return how many of the party's events were left out since the last one that was not;
        None: leave out this one, too.  ``rate``: instead of the common one.
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
    """One party's."""

    __slots__ = ("left_out", "tokens")

    def __init__(self, rate: int) -> None:
        self.tokens = TokenBucket(rate)
        self.left_out = 0


class _Limit(logging.Filter):
    """Leaves out records of parties that cause too many."""

    def __init__(self) -> None:
        super().__init__()
        self._throttle = Throttle(LOG_LINES_PER_SECOND)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == NOTICE or getattr(record, "admitted", False):
            return True
        place = record.pathname, record.lineno
        party = getattr(record, "party", place)
        # A traceback is as long as twenty lines.
        rate = getattr(record, "rate", 1 if record.exc_info else None)
        left_out = self._throttle.admit(party if rate is None else (party, place), rate)
        record.left_out = left_out
        return left_out is not None


class _Words(logging.Formatter):
    """A line for each, but for tracebacks, whose lines are marked."""

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
    """A formatter's lines with their priority in front, for the journal."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in self._inner.format(record).split("\n"))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to standard error, be it a file of limited size by then."""

    _file: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self._file is not None and os.fstat(2).st_size >= LOG_FILE_MAX_BYTES:
            try:
                os.replace(self._file, older(self._file))
                self.write_to(self._file)
            except OSError:  # no such folder any more, or no descriptor: what was written goes
                os.ftruncate(2, 0)

    def write_to(self, path: Path) -> None:
        """Begin the file, as this process's standard output and error."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        sink = os.open(path, flags, 0o600)
        for number in (1, 2):
            os.dup2(sink, number)
        os.close(sink)
        self._file = path


_handler = _Handler()


def configure(words: str, level: int, form: str) -> None:
    """Log to standard error from ``level`` up; ``form`` is one of FORMATS, and ``words`` how a line
    of text looks (``logging.Formatter``).
    """
    formatter: logging.Formatter = _JSON() if form == "json" else _Words(words)
    if _is_journal():
        formatter = _Prefixed(formatter)
    _handler.setStream(sys.stderr)
    _handler.setFormatter(formatter)
    _handler.filters = [_Limit()]
    logging.basicConfig(level=level, handlers=[_handler])


def write_to(path: Path) -> None:
    """Have ``path`` for standard output and error instead, and no more than twice
    LOG_FILE_MAX_BYTES bytes of
    logs: when it is that long it becomes :func:`older`, and is begun again.
    """
    _handler.write_to(path)


def older(path: Path) -> Path:
    """Return where the log before this one is."""
    return path.with_name(f"{path.name}.1")


def _is_journal() -> bool:
    """Whether standard error is the journal: ``JOURNAL_STREAM`` is its device and inode."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
