"""``make test-containers``: the product below Podman itself, in a virtual machine.

It takes longer than other tests (see docs/internals/conformance.md), so that pytest finds it only
by its name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from c_compiler import compile_c
from environments import containerfile
from environments.containerfile import SUITE
from vm.downloads import Unavailable

from .podman_machine import FILES, PodmanMachine, running
from .test_run import GO_SETTINGS, PROGRAMS, STREAMS_AND_DATAGRAMS

ROOT = Path(__file__).parents[2]
GUIDE = ("stream_client", "stream_server", "datagram_client", "datagram_server")

#: What Kubernetes calls "restricted".
ORDINARY_USER = ("--user=1000", "--cap-drop=all", "--security-opt=no-new-privileges")

VSOCK = "python3 -m vsockets.cli"

#: A server in one context and its client in another; the server prints its port first.
EXCHANGE = f"""
export VSOCKETS_DIR=/tmp/fabric HOME=/tmp
mkfifo /tmp/lines
{VSOCK} run --cid host -- {FILES}/KIND_server 0 >/tmp/lines &
exec 3</tmp/lines
read line <&3
{VSOCK} run -v --cid 5 -- {FILES}/KIND_client 2 ${{line##* }}
cat <&3
wait $!
"""

REASON = "vsock run: interceptor trace: a seccomp filter refuses AF_VSOCK (EPERM)\n"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def podman() -> Iterator[PodmanMachine]:
    """The machine, with the programs of these tests."""
    with tempfile.TemporaryDirectory(prefix="pod-", dir="/tmp") as name:
        folder = Path(name)
        programs = {program: folder / program for program in (*GUIDE, "echo")}
        for program in GUIDE:
            source = ROOT / f"examples/c/{program}.c"
            include = f"-I{ROOT / 'src/vsockets/include'}"
            compile_c("-static", include, "-o", programs[program], source)
        command: list[str | Path] = ["go", "build", "-o", programs["echo"], PROGRAMS / "echo.go"]
        if shutil.which("go") is None:
            pytest.skip("no go: apt install what .ci/run does")
        subprocess.run(command, env={**os.environ, **GO_SETTINGS}, check=True)
        files = {program: path.read_bytes() for program, path in programs.items()}
        (clone := folder / "clone").mkdir()
        tracked = subprocess.run(
            ["git", "-c", "safe.directory=*", "archive", "HEAD"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
        subprocess.run(["tar", "--extract"], cwd=clone, input=tracked.stdout, check=True)
        wheel = containerfile.wheel(clone)
        files[f"context/dist/{wheel.name}"] = wheel.read_bytes()
        files["context/ci/Containerfile"] = containerfile.FILE.read_bytes()
        files["go_agent.py"] = Path(__file__).with_name("go_agent.py").read_bytes()
        try:
            with running(folder, files) as machine:
                yield machine
        except Unavailable as error:
            pytest.skip(str(error))


def test_the_default_profile_is_in_force(podman: PodmanMachine) -> None:
    make = "import socket; print(int(socket.socket(40).family))"
    assert podman.run("python3", "-c", make).output == "40\n"
    done = podman.contain("grep", "Seccomp:", "/proc/self/status")
    assert done.output.split() == ["Seccomp:", "2"]
    done = podman.contain("python3", "-c", make)
    assert done.errors.endswith("PermissionError: [Errno 1] Operation not permitted\n")


@pytest.mark.parametrize("user", [(), ORDINARY_USER], ids=["root", "ordinary user"])
def test_the_guides_stream_programs(podman: PodmanMachine, user: tuple[str, ...]) -> None:
    done = podman.contain("sh", "-c", EXCHANGE.replace("KIND", "stream"), options=user)
    assert done == (0, "HELLO FROM CONTEXT 5\nserving context 5\n", REASON)


def test_the_guides_datagram_programs(podman: PodmanMachine) -> None:
    done = podman.contain("sh", "-c", EXCHANGE.replace("KIND", "datagram"))
    you = "you are context 5\n"
    heard = "sendto from context 5\nsend from context 5\n"
    assert done == (0, f"context 2 says: {you}and again: {you}{heard}", REASON)


def test_python_with_threads_and_children(podman: PodmanMachine) -> None:
    options = ("--env", "VSOCKETS_DIR=/tmp/fabric")
    command = (*VSOCK.split(), "run", "--", "python3", "-c", STREAMS_AND_DATAGRAMS)
    done = podman.contain(*command, options=options)
    assert (done.status, done.errors) == (0, "")
    assert "b'datagram' True" in done.output.splitlines()


def test_a_static_go_agent_under_the_fixture(podman: PodmanMachine) -> None:
    command = ("-p", "vsockets.testing.plugin", "-p", "no:cacheprovider", f"{FILES}/go_agent.py")
    options = ("--env", f"AGENT={FILES}/echo")
    done = podman.contain("python3", "-m", "pytest", *command, options=options)
    assert "= 1 passed in " in done.output, done


def test_the_demo(podman: PodmanMachine) -> None:
    done = podman.contain(*VSOCK.split(), "demo", "--json", options=ORDINARY_USER)
    assert done.status == 0, done
    assert all(step["ok"] for step in json.loads(done.output)["steps"])


def test_the_image_of_the_containerfile(podman: PodmanMachine) -> None:
    """Build ``ci/Containerfile`` as it is, and run the image's command and a suite in it."""
    assert podman.import_base().status == 0
    context = f"{FILES}/context"
    # The machine has no network; of all, chroot takes only its own.
    build = ("--isolation=chroot", "--network=host", "--pull=never", "--tag=vsockets")
    done = podman.with_images("build", *build, f"--file={context}/ci/Containerfile", context)
    assert done.status == 0, done
    run = ("--rm", "--network=none", "--cgroups=disabled", "vsockets")
    done = podman.with_images("run", *run)
    assert done.status == 0, done
    assert "fabric (vsockd)" in done.output
    done = podman.with_images("run", *run, "vsock", "fabric", "--", "bash", "-ec", SUITE)
    assert done == (0, "from guest 3\n", "")
