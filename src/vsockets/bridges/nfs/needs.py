"""What a machine must have for mounting, and what to do where it is missing."""

from __future__ import annotations

import os
import shutil

DEVICE = "/dev/fuse"


def require(device: str = DEVICE) -> None:
    """Raises OSError where nothing can be mounted: one line that says what to do."""
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        why = "mounting needs pyfuse3: apt install python3-pyfuse3, or pip install 'vsockets[nfs]'"
        raise OSError(f"{why} ({error})") from None
    try:
        os.close(os.open(device, os.O_RDWR))
    except PermissionError:
        pass  # fusermount3 has it
    except OSError as error:
        why = f"{device}: {error.strerror}; modprobe fuse, or take a kernel that has FUSE"
        raise OSError(error.errno, why) from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise OSError("who is not root needs fusermount3 to mount: apt install fuse3")
