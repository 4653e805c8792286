"""The NFS client as ``python -m vsockets.nfs``, for a guest that has only Python and pyfuse3."""

from __future__ import annotations

import argparse
import sys

from .. import logs
from ..model.locator import parse_locator
from ..model.text import printable
from . import preflight


def main() -> int:
    """Run ``vsock nfs mount`` without the libraries of the command line."""
    parser = argparse.ArgumentParser(prog="vsockets.nfs", description=__doc__)
    parser.add_argument("server", type=parse_locator)
    parser.add_argument("export")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    logs.configure("vsock: %(message)s", logs.NOTICE, "text")
    try:
        preflight.check()
        from . import fuse_mount

        fuse_mount.mount(arguments.server, arguments.export, arguments.folder)
    except OSError as error:
        print(f"vsock: {printable(error.strerror or str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
