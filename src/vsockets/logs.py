"""What programs that go on for long write to standard error: words, or a JSON object a line.

Under systemd standard error is the journal, which takes a line's priority from a number in
angle brackets before it (``sd-daemon(3)``).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

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


class _Words(logging.Formatter):
    """A line for each, but for tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = " ".join(record.getMessage().split())
        line = self.formatMessage(record)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JSON(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
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
        return "\n".join(prefix + line for line in self._inner.format(record).splitlines())


def begin(words: str, level: int, form: str) -> None:
    """Log to standard error from ``level`` up; ``form`` is one of FORMATS, and ``words`` how a line
    of text looks (``logging.Formatter``).
    """
    formatter: logging.Formatter = _JSON() if form == "json" else _Words(words)
    if _is_journal():
        formatter = _Prefixed(formatter)
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler])


def _is_journal() -> bool:
    """Whether standard error is the journal: ``JOURNAL_STREAM`` is its device and inode."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
