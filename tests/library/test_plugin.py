"""The pytest plugin, in a separate pytest that runs tests in parallel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = '''
import os
import time

import pytest
import vsockets

@pytest.mark.parametrize("number", range(2))
def test_each_has_the_port_to_itself(vsock_fabric, number):
    """Both tests bind the port at the same time, each in its own fabric."""
    guest = vsock_fabric.guest(3)
    with vsockets.create_server((2, 5000), context=vsock_fabric.host) as server:
        with open(f"{os.environ['SHARED']}/{number}", "w") as mark:
            mark.write(str(vsock_fabric.folder))
        with vsockets.create_connection((2, 5000), context=guest), server.accept()[0]:
            until = time.monotonic() + 60
            while not os.path.exists(f"{os.environ['SHARED']}/{1 - number}"):
                assert time.monotonic() < until, "the other test does not run at the same time"
                time.sleep(0.02)
'''


AGENT = """#!{python}
import socket
sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
sock.connect((socket.VMADDR_CID_HOST, 5000))
"""


def test_example_of_readme(tmp_path: Path) -> None:
    """The agent does not use this package; its AF_VSOCK must be the fabric's."""
    pytest.importorskip("click", reason="vsock needs click")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = readme.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "test_example.py").write_text(example)
    agent = tmp_path / "your_agent"
    agent.write_text(AGENT.format(python=sys.executable))
    agent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=60"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_parallel_tests_have_separate_fabrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    (tmp_path / "test_parallel.py").write_text(TESTS)
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("SHARED", str(shared))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-q", "-p", "no:cacheprovider", tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert len({mark.read_text() for mark in shared.iterdir()}) == 2
