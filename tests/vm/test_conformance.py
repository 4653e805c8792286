"""The Linux kernel's ``vsock_test`` between a guest and the host.

The expected results are in docs/internals/conformance.md.

The guest's side is a stock kernel's AF_VSOCK over each of our devices, the host's runs under
``vsock run``.  The two sides also have a TCP control connection, for which the guest has a network
card.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.vsock import Vsock
from conformance.kernel_suite import (
    TABLES,
    Case,
    Unavailable,
    free_port,
    listens,
    table,
    vsock_test,
)
from vsockets.testing import PrivateFabric, wait_until

from .conftest import COMMON, NETWORK_UP, Stage, network_card
from .image import LOOPBACK, NETWORK
from .machine import PATIENCE, Machine

CASES = {
    "vmci": table("With a guest of VMware's device"),
    "virtio": table("With a guest of virtio"),
}

#: The guest's control port, and the host's address on the guest's network card.
CONTROL, HOST = 1234, "10.0.2.2"

_PROGRAM = "/vsock_test"
#: Timeout of one run in seconds.
_RUN = 100.0


class Peers:
    """A guest and the host, each with the test program."""

    def __init__(self, machine: Machine, vsock: Vsock, program: Path, port: int) -> None:
        self.cases = CASES[machine.kind]
        self._machine = machine
        self._vsock = vsock
        self._program = program
        self._port = port
        machine.put({_PROGRAM: program.read_bytes()})

    def run(self, client: str, cases: list[Case]) -> tuple[str, bool]:
        """Run cases; return the output, and whether both sides succeeded."""
        picks = [f"--pick={case.id}" for case in cases]
        return self._guest_is_client(picks) if client == "guest" else self._host_is_client(picks)

    def _in_guest(self, mode: str, *arguments: str) -> str:
        command = [_PROGRAM, f"--mode={mode}", "--peer-cid=2", *arguments]
        return f"""
import subprocess
done = subprocess.run({command!r}, capture_output=True, text=True)
result = done.stdout + done.stderr, done.returncode
"""

    def _on_host(self, mode: str, *arguments: str) -> tuple[object, ...]:
        program = (self._program, f"--mode={mode}", f"--peer-cid={self._machine.cid}")
        return ("run", "--cid", "host", "--", *program, *arguments)

    def _guest_is_client(self, picks: list[str]) -> tuple[str, bool]:
        control = free_port()
        arguments = (f"--control-port={control}", *picks)
        serving = self._vsock.start(*self._on_host("server", *arguments))
        wait_until(lambda: listens(control) or serving.process.poll() is not None, "the server")
        script = self._in_guest("client", f"--control-host={HOST}", *arguments)
        output, status = self._machine.run(script, timeout=_RUN)
        served = b"".join(serving.process.communicate(timeout=_RUN)).decode()
        return f"{output}\nserver: {served}", (status, serving.process.returncode) == (0, 0)

    def _host_is_client(self, picks: list[str]) -> tuple[str, bool]:
        job = self._machine.start(self._in_guest("server", f"--control-port={CONTROL}", *picks))
        listening = f"any(':{CONTROL:04X} ' in row for row in open('/proc/net/tcp'))"
        wait_until(lambda: self._machine.run(f"result = {listening}"), "the server", PATIENCE)
        arguments = ("--control-host=127.0.0.1", f"--control-port={self._port}", *picks)
        running = self._vsock.start(*self._on_host("client", *arguments)).process
        output = b"".join(running.communicate(timeout=_RUN)).decode()
        served, status = job.result(_RUN)
        return f"{output}\nserver: {served}", (running.returncode, status) == (0, 0)


@pytest.fixture(scope="module", params=list(CASES))
def peers(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Peers]:
    try:
        program = vsock_test()
    except Unavailable as reason:
        pytest.skip(f"the kernel's tests are not available: {reason}")
    port = free_port()
    with (
        PrivateFabric() as fabric,
        Vsock(fabric.folder) as vsock,
        stage.machine(
            fabric, "newest", device=request.param, arguments=network_card(port, CONTROL)
        ) as machine,
    ):
        machine.run(COMMON)
        machine.run(NETWORK_UP, modules=[*NETWORK, *LOOPBACK])
        yield Peers(machine, vsock, program, port)


@pytest.mark.parametrize(("client", "column"), [("guest", 0), ("host", 1)])
class TestSuite:
    def test_passing_cases_pass(self, peers: Peers, client: str, column: int) -> None:
        passing = [case for case in peers.cases if case.results[column] == "pass"]
        assert len(passing) >= 19
        output, succeeded = peers.run(client, passing)
        passed = {int(number) for number in re.findall(r"^(\d+) - .*\.\.\.ok$", output, re.M)}
        assert passed == {case.id for case in passing}, output
        assert succeeded, output

    def test_failing_cases_fail(self, peers: Peers, client: str, column: int) -> None:
        for case in peers.cases:
            if case.results[column] == "fail":
                output, succeeded = peers.run(client, [case])
                assert not succeeded, f"{case.name} passes: update {TABLES.name}\n{output}"
