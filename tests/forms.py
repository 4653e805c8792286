"""The short form of a test, which ``make test`` runs, and the whole one of ``make test-long``."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

IS_WHOLE = bool(os.environ.get("VSOCKETS_TEST_LONG"))


def choose(short: T, whole: T) -> T:
    """Return the value for the form that runs: of a count, a size or a choice of files."""
    return whole if IS_WHOLE else short
