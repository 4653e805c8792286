"""The wheel without its dependencies, in a guest that has python3-minimal alone."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from . import downloads
from .machine import Machine

ROOT = Path(__file__).parents[2]

#: Links the modules of python3-minimal to a folder of their own, and runs a program with no others.
RUN = """
import os, subprocess, sys
version = f"python{sys.version_info.major}.{sys.version_info.minor}"
for name in modules:
    path = f"/minimal/lib/{version}/{name}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.lexists(path):
        os.symlink(f"/usr/lib/{version}/{name}", path)
done = subprocess.run(
    [f"/usr/bin/{version}", "-S", "-c", program, str(port)],
    env={"PYTHONHOME": "/minimal", "PYTHONPATH": "/wheel", "VSOCKETS_TRANSPORT": "kernel"},
    capture_output=True, text=True,
)
result = done.stdout, done.stderr
"""

PROGRAM = """
import socket, sys, vsockets
assert vsockets.__file__ == "/wheel/vsockets/__init__.py", vsockets.__file__
try:
    import json
except ModuleNotFoundError:
    pass  # of python3, not of python3-minimal
else:
    sys.exit("more than python3-minimal")
port = int(sys.argv[1])
with vsockets.create_connection((vsockets.VMADDR_CID_HOST, port)) as sock:
    sock.sendall(b"stream")
    print(sock.recv(100).decode())
with vsockets.socket(type=socket.SOCK_DGRAM) as sock:
    sock.bind((vsockets.VMADDR_CID_ANY, vsockets.VMADDR_PORT_ANY))
    sock.sendto(b"datagram", (vsockets.VMADDR_CID_HOST, port))
    print(sock.recv(100).decode())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the wheel, as an installer unpacks them."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("build", "--target", "wheel", "--directory", str(folder))
    subprocess.run([sys.executable, "-m", "hatchling", *build], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as files:
        return {f"/wheel/{name}": files.read(name) for name in files.namelist()}


# One kernel is enough: both have the same programs.
@pytest.mark.parametrize("machine", ["stable"], indirect=True)
def test_a_stream_and_a_datagram(
    machine: Machine, wheel: dict[str, bytes], fabric_of_machines: PrivateFabric
) -> None:
    machine.put(wheel)
    address = (vsockets.VMADDR_CID_HOST, vsockets.VMADDR_PORT_ANY)
    host = fabric_of_machines.host
    with (
        vsockets.create_server(address, context=host) as server,
        vsockets.socket(type=socket.SOCK_DGRAM, context=host) as datagrams,
    ):
        port = server.getsockname()[1]
        datagrams.bind((vsockets.VMADDR_CID_HOST, port))
        job = machine.start(RUN, modules=downloads.minimal_modules(), program=PROGRAM, port=port)
        sock, (cid, _) = server.accept()
        with sock:
            assert (cid, sock.recv(100)) == (machine.cid, b"stream")
            sock.sendall(b"over a stream")
        datagrams.settimeout(60)
        data, source = datagrams.recvfrom(100)
        assert (data, source[0]) == (b"datagram", machine.cid)
        datagrams.sendto(b"as a datagram", source)
        assert job.result() == ("over a stream\nas a datagram\n", "")
