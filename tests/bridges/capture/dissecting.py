"""What tshark says of a capture."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")

CONNECT, DISCONNECT, PAYLOAD = "1", "2", "4"

_FIELDS = (
    *("vsock.op", "vsock.src_cid", "vsock.src_port", "vsock.dst_cid", "vsock.dst_port"),
    *("frame.len", "vsock.payload"),
)


def dissect(file: Path) -> list[tuple[str, str, str, int, bytes]]:
    """Of each record the operation, source, destination, whole length and payload."""
    command = ["tshark", "-n", "-r", str(file), "-T", "fields", "-E", "separator=,"]
    for field in _FIELDS:
        command += ["-e", field]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    records = []
    for line in done.stdout.splitlines():
        operation, *addresses, length, payload = line.split(",")
        source, destination = ":".join(addresses[:2]), ":".join(addresses[2:])
        records.append((operation, source, destination, int(length), bytes.fromhex(payload)))
    return records
