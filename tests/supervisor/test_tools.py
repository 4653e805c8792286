"""Common tools: socat, OpenSSH."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vsockets
from cli.vsock import Running, Vsock
from vsockets.testing import PrivateFabric, wait_until

GIGABYTE = 1_000_000_000

PRODUCE = f"""
import hashlib, os, sys
digest, left, block = hashlib.sha256(), {GIGABYTE}, os.urandom(1 << 20)
out = sys.stdout.buffer
while left:
    block = (block[1:] + block[:1])[:left]
    digest.update(block); out.write(block); left -= len(block)
out.flush()
print(digest.hexdigest(), file=sys.stderr)
"""
CONSUME = """
import hashlib, sys
digest = hashlib.sha256()
while block := sys.stdin.buffer.read1(1 << 20): digest.update(block)
print(digest.hexdigest())
"""


#: Seconds to transfer a gigabyte on a busy machine.
PATIENCE = 120.0
pytestmark = pytest.mark.timeout(3 * PATIENCE)


def python(source: str) -> str:
    return shlex.join([sys.executable, "-c", source])


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: apt install what .ci/run does")


def wait_for_listener(fabric: PrivateFabric, port: int, program: Running) -> None:
    """Wait until a port of any context has a listener; fail if ``program`` ends before."""

    def listens() -> bool:
        if program.process.poll() is not None:
            raise AssertionError(f"the listening program has ended: {program.finish()}")
        rows = fabric.control.sockets()
        return any((row["port"], row["state"]) == (port, "listening") for row in rows)

    wait_until(listens, "a listener", PATIENCE)


@pytest.mark.parametrize("how", ["suspend", "power_off"])
def test_suspending_drops_a_supervised_programs_streams(
    vsock: Vsock, fabric: PrivateFabric, how: str
) -> None:
    """The guest's program is written in C, and it alone holds its descriptors."""
    needs("socat")
    guest = fabric.control.add_context()["cid"]
    with vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=fabric.host) as server:
        server.settimeout(PATIENCE)
        target = f"VSOCK-CONNECT:2:{server.getsockname()[1]}"
        program = vsock.start("run", "--cid", guest, "--", "socat", "-u", target, "-")
        accepted, peer = server.accept()
        with accepted:
            assert peer[0] == guest
            assert getattr(fabric.control, how)(guest)["streams_left"] == []
            accepted.settimeout(PATIENCE)
            assert accepted.recv(1) == b""
            assert program.finish() == (b"", "")


@pytest.mark.parametrize("sender", ["host", "84"])
def test_socat_transfers_a_gigabyte(vsock: Vsock, fabric: PrivateFabric, sender: str) -> None:
    needs("socat")
    receiver = "84" if sender == "host" else "host"
    peer = 84 if sender == "host" else 2
    port = 7100 + (sender == "host")
    vsock("context", "add", "84", expect=None)
    take = f"socat -u -b 262144 VSOCK-LISTEN:{port} - | {python(CONSUME)}"
    give = f"{python(PRODUCE)} | socat -u -b 262144 - VSOCK-CONNECT:{peer}:{port}"
    taking = vsock.start("run", "--cid", receiver, "sh", "-c", take)
    wait_for_listener(fabric, port, taking)
    given = vsock("run", "--cid", sender, "sh", "-c", give, patience=PATIENCE)
    assert taking.finish()[0].decode() == given.stderr


@pytest.mark.parametrize("server", ["host", "85"])
def test_ncat_transfers_a_file(vsock: Vsock, fabric: PrivateFabric, server: str) -> None:
    needs("ncat")
    cid, client = ("2", "85") if server == "host" else ("85", "host")
    port = 7110 + (server == "host")
    vsock("context", "add", "85", expect=None)
    serving = vsock.start("run", "--cid", server, "--", "ncat", "--vsock", "-l", port)
    wait_for_listener(fabric, port, serving)
    source = f"{python('print(7 * 100_000)')} | ncat --vsock --send-only {cid} {port}"
    assert vsock("run", "--cid", client, "sh", "-c", source).stderr == ""
    assert serving.finish() == (b"700000\n", "")


#: ssh's options for a host vsock-CID, from docs/adapters.md.
BY_VSOCK_CONNECT = """sh -c 'exec vsock connect "${1#vsock-}" 22' - %h"""


@pytest.mark.parametrize("proxy", ["socat - VSOCK-CONNECT:75:22", BY_VSOCK_CONNECT])
def test_ssh_reaches_a_guest_without_a_network(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path, proxy: str
) -> None:
    sshd = "/usr/sbin/sshd"
    needs("socat", "ssh", "ssh-keygen", sshd)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)]
        subprocess.run(command, check=True)
    (tmp_path / "config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\n"
        "UsePAM no\nPidFile none\nPermitRootLogin yes\n"
    )
    script = tmp_path / "serve"
    script.write_text(f"#!/bin/sh\nexec {sshd} -i -f {tmp_path}/config 2>>{tmp_path}/log\n")
    script.chmod(0o755)
    in_the_guest = ("run", "--cid", "75", "--reserved-ports", "--")
    serving = vsock.start(*in_the_guest, "socat", "VSOCK-LISTEN:22,fork", f"EXEC:{script}")
    wait_for_listener(fabric, 22, serving)
    options = {
        "ProxyCommand": proxy.replace("exec vsock", f"exec {sys.executable} -m vsockets.cli"),
        "IdentityFile": tmp_path / "user",
        "UserKnownHostsFile": tmp_path / "known",
        "StrictHostKeyChecking": "accept-new",
        "BatchMode": "yes",
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    done = vsock(
        *("run", "--cid", "host", "--", "ssh", "-F", "none", *flags),
        *(f"{getpass.getuser()}@vsock-75", "echo from the guest; exit 3"),
        expect=None,
    )
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert (done.stdout, done.returncode) == ("from the guest\n", 3), done.stderr + log


def test_socat_exports_a_unix_socket_service(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    """The way of docs/run.md for gRPC, whose wheels lack vsock."""
    needs("socat")
    service, entrance = str(tmp_path / "server"), str(tmp_path / "client")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(service)
        server.listen()
        server.settimeout(PATIENCE)
        there = ("socat", "VSOCK-LISTEN:5100,fork", f"UNIX-CONNECT:{service}")
        here = ("socat", f"UNIX-LISTEN:{entrance},fork", "VSOCK-CONNECT:2:5100")
        serving = vsock.start("run", "--cid", "host", "--", *there)
        vsock.start("run", "--cid", "78", "--", *here)
        wait_for_listener(fabric, 5100, serving)
        wait_until(lambda: os.path.exists(entrance), "the entrance")
        for number in range(2):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                # The name exists shortly before socat listens on it.
                wait_until(lambda: client.connect_ex(entrance) == 0, "socat to listen")
                client.sendall(b"call %d" % number)
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(PATIENCE)
                    assert accepted.recv(100) == b"call %d" % number
                    accepted.sendall(b"answer")
                    assert client.recv(100) == b"answer"
