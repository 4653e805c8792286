"""grpcio, which lacks vSockets in its wheels: unix sockets, connected by ``vsock forward``."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest

from vsockets.testing import PrivateFabric

grpc: Any = pytest.importorskip("grpc", reason="needs grpcio")


def forward(environment: dict[str, str], *arguments: object) -> tuple[subprocess.Popen[str], str]:
    """Start a forwarder; return it and its first line."""
    command = [sys.executable, "-m", "vsockets.cli", "forward", "-v", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    return process, process.stderr.readline()


def test_unary_call(fabric: PrivateFabric, tmp_path: Path) -> None:
    service, entrance = tmp_path / "service", tmp_path / "entrance"

    def shout(request: bytes, context: object) -> bytes:
        return request.upper()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(shout)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t", {"Shout": handler})])
    server.add_insecure_port(f"unix:{service}")
    server.start()
    host, output = forward(fabric.environment(fabric.host), "vsock::any", f"unix:{service}")
    found = re.search(r":(\d+)$", output.strip())
    assert found, output
    inside = fabric.environment(fabric.guest())
    guest, _ = forward(inside, f"unix:{entrance}", f"vsock:host:{found[1]}")
    try:
        with grpc.insecure_channel(f"unix:{entrance}") as channel:
            call = channel.unary_unary("/t/Shout")
            assert call(b"x" * 1_000_000, timeout=30) == b"X" * 1_000_000
    finally:
        for process in (host, guest):
            process.terminate()
            process.communicate(timeout=30)
        server.stop(None).wait(30)
