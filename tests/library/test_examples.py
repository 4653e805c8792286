"""The examples run, and docs/porting.md contains them unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/python"
EXAMPLES = sorted([*FOLDER.glob("*_client.py"), *FOLDER.glob("*_server.py")])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_page_contains_the_example(example: Path) -> None:
    text = example.read_text()
    assert f"```python\n{text}```" in (ROOT / "docs" / "porting.md").read_text()
    assert len(text.splitlines()) < 20


@pytest.mark.parametrize(
    ("kind", "output"),
    [("stream", "HELLO FROM CONTEXT 7\n"), ("datagram", "you are context 7, port ")],
)
def test_example_runs(vsock_fabric: PrivateFabric, kind: str, output: str) -> None:
    guest = vsock_fabric.guest(7)
    path = {"PYTHONPATH": os.path.dirname(os.path.dirname(vsockets.__file__))}
    server = subprocess.Popen(
        [sys.executable, f"examples/python/{kind}_server.py"],
        cwd=ROOT,
        env={**vsock_fabric.environment(vsock_fabric.host), **path},
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline().startswith("listening on (2, 500")
            client = subprocess.run(
                [sys.executable, f"examples/python/{kind}_client.py"],
                cwd=ROOT,
                env={**vsock_fabric.environment(guest), **path},
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert client.stderr == ""
            assert client.stdout.startswith(output)
            assert server.wait(20) == 0
        finally:
            server.kill()
