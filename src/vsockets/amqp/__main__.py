"""``python -m vsockets.amqp``: the guest proxy for guests with only the standard library."""

from __future__ import annotations

import argparse
import sys

from .. import logs
from ..attachment import current
from ..model.locator import parse_locator
from ..model.text import printable
from .guest_proxy import GuestProxy
from .service import run


def main() -> int:
    """Run the guest proxy like ``vsock amqp guest-proxy``, without the command line's libraries."""
    parser = argparse.ArgumentParser(prog="vsockets.amqp", description=__doc__)
    parser.add_argument("--listen", type=parse_locator, default="tcp:127.0.0.1:5672")
    parser.add_argument("--host", type=parse_locator, default="vsock:2:5672")
    arguments = parser.parse_args()
    logs.configure("vsock: %(message)s", logs.NOTICE, "text")
    try:
        run(lambda: GuestProxy(arguments.listen, arguments.host, current()), arguments.listen)
    except OSError as error:
        print(f"vsock: {printable(error.strerror or str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
