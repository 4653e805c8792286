"""``vsock include-dir``: print the folder of the C header."""

from __future__ import annotations

from pathlib import Path

from .groups import command

INCLUDE = Path(__file__).parents[1] / "include"


@command("include-dir")
def include_dir() -> None:
    """Print the folder of vmci_sockets.h, for a C compiler's -I."""
    print(INCLUDE)
