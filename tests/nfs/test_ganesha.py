"""An unmodified stock NFS server behind ``vsock forward``, mounted by our client."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm import downloads
from vsockets.testing import PrivateFabric

from .ganesha import MOUNT_PORT, PORT, PrivateGanesha
from .stage import NEEDS_MOUNTING, NFS, PATIENCE, VSOCK, Program, digests

pytestmark = NEEDS_MOUNTING


@pytest.fixture
def ganesha(tmp_path: Path) -> Iterator[PrivateGanesha]:
    if subprocess.run(["unshare", "--net", "--mount", "true"], check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    if shutil.which("ip") is None:
        pytest.skip("ip not found: apt install iproute2")
    try:
        root = downloads.ganesha()
    except downloads.Unavailable as error:
        if os.environ.get("VSOCKETS_REQUIRE_VM"):
            raise
        pytest.skip(f"nfs-ganesha is not available: {error}")
    export = tmp_path / "export"
    export.mkdir()
    with PrivateGanesha(root, tmp_path, export) as server:
        yield server


def test_stock_server_behind_a_forward(ganesha: PrivateGanesha, tmp_path: Path) -> None:
    export, top, original = (tmp_path / name for name in ("export", "mounted", "original"))
    top.mkdir()
    shutil.copytree(
        Path(os.__file__).parent / "email", original, ignore=shutil.ignore_patterns("*.pyc")
    )
    large = os.urandom(3 << 20)
    (original / "large").write_bytes(large)
    programs: list[Program] = []
    with PrivateFabric() as fabric:
        try:
            for port in (PORT, MOUNT_PORT):
                ends = f"vsock-dgram::{port}", f"udp:127.0.0.1:{port}"
                forward = ganesha.in_namespace(*VSOCK, "forward", "-v", *ends)
                programs.append(Program(forward, fabric.environment(fabric.host)))
                assert "listening" in programs[-1].line, programs[-1].line
            mount = (*NFS, "mount", f"vsock-dgram:2:{PORT}", str(export), str(top))
            mount_server = f"--mount-server=vsock-dgram:2:{MOUNT_PORT}"
            programs.append(Program((*mount, mount_server), fabric.environment(fabric.guest())))
            assert "mounted on" in programs[-1].line, programs[-1].line

            subprocess.run(["cp", "-r", original, top / "copy"], check=True, timeout=PATIENCE)
            assert digests(export / "copy") == digests(original) == digests(top / "copy")

            os.rename(top / "copy" / "large", top / "moved")
            shutil.rmtree(top / "copy")
            os.symlink("moved", top / "symbolic")
            os.link(top / "moved", top / "link")
            assert sorted(os.listdir(export)) == ["link", "moved", "symbolic"]
            for number in range(300):
                (top / str(number)).touch()
            assert len(os.listdir(top)) == 303

            # A separate process: a child of this one would flush its copies of open files to the
            # dead server.
            writer = subprocess.Popen(
                ["dd", f"of={top / 'file'}", "bs=64k", "iflag=fullblock", "status=none"],
                stdin=subprocess.PIPE,
            )
            assert writer.stdin is not None
            writer.stdin.write(large)
            ganesha.kill()
            ganesha.start()
            writer.stdin.write(large)
            writer.stdin.close()
            assert writer.wait(PATIENCE) == 0
            assert (export / "file").read_bytes() == (top / "file").read_bytes() == large * 2
        finally:
            subprocess.run(["umount", "-l", top], capture_output=True, check=False)
            for program in reversed(programs):
                program.end()
