"""The command line: one module for each command of ``vsock``, loaded by ``app``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run ``vsock`` with the arguments of this process and return its exit status."""
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
