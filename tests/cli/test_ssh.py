"""ssh and its kin reach guests by CID, by name, and by hybrid vsock, each with its own host key."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vsockets.testing import wait_until

from .vsock import PATIENCE, Vsock

SSHD = "/usr/sbin/sshd"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("ssh", "ssh-keygen", "scp", "sftp", SSHD))),
    reason="needs ssh, ssh-keygen, scp, sftp and sshd",
)


class Ssh:
    """ssh on the host, with the shipped configuration, and a guest that serves it."""

    def __init__(self, folder: Path, vsock: Vsock) -> None:
        self.folder = folder
        self._vsock = vsock
        for key in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(command, check=True)
        (folder / "sshd").write_text(
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
            "UsePAM no\nPidFile none\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n"
        )
        program = f"{sys.executable} -m vsockets.cli"
        shipped = vsock("ssh-proxy", "--config").stdout
        (folder / "config").write_text(
            shipped.replace("ProxyCommand vsock ", f"ProxyCommand {program} ")
            + f"Host *\nIdentityFile {folder}/user\nUserKnownHostsFile {folder}/known\n"
            "StrictHostKeyChecking accept-new\nBatchMode yes\n"
        )

    def serve(self, cid: int) -> None:
        """Serve ssh at port 22 of a guest."""
        run = ("run", "--cid", cid, "--reserved-ports", "--", sys.executable, "-m", "vsockets.cli")
        serving = self._vsock.start(
            *run, "listen", "--keep", "--verbose", "--exec", f"{SSHD} -i -f {self.folder}/sshd", 22
        )
        assert serving.error_line().startswith("listening on")

    def __call__(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run ssh, scp or sftp."""
        command = [program, "-F", str(self.folder / "config"), *map(str, arguments)]
        return subprocess.run(
            command,
            env=self._vsock.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    @property
    def known(self) -> list[str]:
        """The hosts whose keys are known."""
        return [line.split()[0] for line in (self.folder / "known").read_text().splitlines()]


@pytest.fixture
def ssh(vsock: Vsock, tmp_path: Path) -> Ssh:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    return Ssh(tmp_path, vsock)


USER = getpass.getuser()


def test_by_cid_and_by_name(ssh: Ssh, vsock: Vsock, tmp_path: Path) -> None:
    vsock("context", "add", "75", "--name", "Web", "--reserved-ports")
    ssh.serve(75)
    done = ssh("ssh", f"{USER}@vsock/75", "echo from the guest; exit 3")
    assert (done.stdout, done.returncode) == ("from the guest\n", 3), done.stderr
    done = ssh("ssh", f"{USER}@web.vsock", "cat", "/proc/self/comm")
    assert done.stdout == "cat\n", done.stderr
    assert ssh.known == ["vsock/75", "web.vsock"]  # a key for each machine

    (tmp_path / "file").write_bytes(os.urandom(300_000))
    done = ssh("scp", tmp_path / "file", f"{USER}@web.vsock:{tmp_path}/copy")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    (tmp_path / "batch").write_text(f"get {tmp_path}/copy {tmp_path}/third\n")
    done = ssh("sftp", "-b", tmp_path / "batch", f"{USER}@web.vsock")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "third").read_bytes() == (tmp_path / "file").read_bytes()


def test_ssh_over_hybrid_vsock(ssh: Ssh, vsock: Vsock) -> None:
    path = vsock.folder / "mux"
    vsock("context", "add", "76", "--hybrid", path, "--reserved-ports")
    ssh.serve(76)
    done = ssh("ssh", f"{USER}@vsock-mux{path}", "echo from the guest")
    assert done.stdout == "from the guest\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "expected HOST, or --config"),
        (["web"], 2, "HOST web: expected vsock/CID, vsock-mux/PATH or NAME.vsock"),
        (["vsock/x"], 2, "HOST vsock/x: "),
        (["missing.vsock"], 1, "missing: no context has this name (see: vsock context ls)"),
        (["vsock/77"], 1, "connect to vsock:77:22: no such context"),
    ],
)
def test_hosts_that_cannot_be_reached(
    vsock: Vsock, arguments: list[str], status: int, message: str
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        running = vsock.start("ssh-proxy", *arguments, stdout=theirs.fileno())
        theirs.close()
        _, said = running.finish(expect=status)
        assert message in said
        assert ours.recv(1) == b""


def test_standard_output_must_be_ssh(vsock: Vsock) -> None:
    said = vsock("ssh-proxy", "vsock/3", expect=1).stderr
    assert "standard output is not a socket (expected: called by ssh" in said


def test_two_contexts_with_the_name(vsock: Vsock) -> None:
    for cid in (78, 79):
        vsock("context", "add", cid, "--name", "twin")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        running = vsock.start("ssh-proxy", "twin.vsock", stdout=theirs.fileno())
        assert "twin: contexts 78, 79 have this name" in running.finish(expect=1)[1]


def test_no_process_stays_between(ssh: Ssh, vsock: Vsock) -> None:
    vsock("context", "add", "80", "--reserved-ports")
    ssh.serve(80)
    with subprocess.Popen(
        ["ssh", "-F", str(ssh.folder / "config"), f"{USER}@vsock/80", "echo up; cat"],
        env=vsock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as session:
        assert session.stdin is not None and session.stdout is not None
        assert session.stdout.readline() == b"up\n"

        def proxies() -> bytes:
            children = Path(f"/proc/{session.pid}/task/{session.pid}/children")
            return children.read_bytes().strip()

        wait_until(lambda: not proxies(), "the proxy to end")
        session.stdin.write(b"still here")
        session.stdin.close()
        assert session.stdout.read() == b"still here"


@pytest.mark.parametrize("host", ["vsock/", "vsock/any", "vsock/4294967295", ".vsock"])
def test_a_host_that_names_no_context(vsock: Vsock, host: str) -> None:
    """The empty name is not that of a context without a name."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-m", "vsockets.cli", "ssh-proxy", host],
            env=vsock.environment,
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 2
    assert f"HOST {host}: expected " in done.stderr
