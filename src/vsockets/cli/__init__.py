"""The command line: one module for each command of ``vsock``, loaded by ``app``."""

from __future__ import annotations

import os
import sys


def fill_standard_files() -> None:
    """Open ``/dev/null`` for closed standard descriptors, so that no other file gets their numbers.

    Programs executed by this process do not inherit it: these descriptors stay closed for them.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for the process


def main() -> int:
    """Run ``vsock`` with the arguments of this process and return its exit status."""
    fill_standard_files()
    try:
        from .app import start
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        from ..extras import how_to_install

        print(f"vsock: the Python package click is missing: {how_to_install()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return start(sys.argv[1:])
