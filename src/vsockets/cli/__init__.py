"""The command line: one module per command, put together in ``cli``."""

from __future__ import annotations

import sys


def main() -> int:
    """The ``vsock`` program; returns its exit status."""
    try:
        import rich  # noqa: F401 - imported to know now, in one line, that it is missing
        import typer  # noqa: F401
    except ImportError:
        from ..extras import how_to_install

        print(
            f"vsock: the command line needs typer and rich: {how_to_install('cli')}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    from .app import start

    return start(sys.argv[1:])
