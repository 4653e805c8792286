"""``vsock include-dir``: where the C header is."""

from __future__ import annotations

from pathlib import Path

INCLUDE = Path(__file__).parents[1] / "include"


def include_dir() -> None:
    """Print the folder of vmci_sockets.h, for a C compiler's -I."""
    print(INCLUDE)
