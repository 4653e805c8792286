"""What a machine must have for mounting, and what to do where it is missing."""

from __future__ import annotations

import os
import shutil
import sys

DEVICE = "/dev/fuse"


def require(device: str = DEVICE) -> None:
    """Raises OSError where nothing can be mounted: one line that says what to do."""
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        from ...extras import how_to_install  # here: it is seldom needed

        how = how_to_install("nfs")
        if sys.prefix == sys.base_prefix:  # a virtual environment does not see Debian's
            how = f"apt install python3-pyfuse3, or {how}"
        raise OSError(f"mounting needs pyfuse3: {how} ({error})") from None
    try:
        os.close(os.open(device, os.O_RDWR))
    except PermissionError:
        pass  # fusermount3 has it
    except OSError as error:
        why = f"{device}: {error.strerror}; modprobe fuse, or take a kernel that has FUSE"
        raise OSError(error.errno, why) from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise OSError("who is not root needs fusermount3 to mount: apt install fuse3")
