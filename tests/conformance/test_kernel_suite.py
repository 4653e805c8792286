"""The Linux kernel's ``vsock_test``, against docs/internals/conformance.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.vsock import Vsock
from vsockets.testing import PrivateFabric, wait_until

from .kernel_suite import TABLES, Case, Unavailable, free_port, listens, table, vsock_test

#: Seconds for all cases together: some take two seconds each.
PATIENCE = 150.0
pytestmark = pytest.mark.timeout(2 * PATIENCE)

GUEST = 90


CASES = table("The Linux kernel's own vsock tests")


@pytest.fixture(scope="module")
def program() -> Path:
    try:
        return vsock_test()
    except Unavailable as reason:
        pytest.skip(f"the kernel's tests cannot be had: {reason}")


@pytest.fixture(scope="module")
def vsock() -> Iterator[Vsock]:
    with PrivateFabric() as fabric, Vsock(fabric.folder) as vsock:
        fabric.guest(GUEST)
        yield vsock


def run(vsock: Vsock, program: Path, client: str, cases: list[Case]) -> tuple[str, bool]:
    """Run cases; return the client's output, and whether both sides succeeded."""
    server, server_cid, client_cid = ("host", 2, GUEST) if client != "host" else (GUEST, GUEST, 2)
    control = free_port()
    common = [f"--control-port={control}", *(f"--pick={case.id}" for case in cases)]
    serving = vsock.start(
        *("run", "--cid", server, "--", program, "--mode=server"),
        *(f"--peer-cid={client_cid}", *common),
    )
    wait_until(lambda: listens(control) or serving.process.poll() is not None, "the server", 60)
    done = vsock(
        *("run", "--cid", client, "--", program, "--mode=client", "--control-host=127.0.0.1"),
        *(f"--peer-cid={server_cid}", *common),
        expect=None,
        patience=PATIENCE,
    )
    serving.process.wait(PATIENCE)
    return done.stdout + done.stderr, (done.returncode, serving.process.returncode) == (0, 0)


def test_the_table_lists_the_suites_cases(vsock: Vsock, program: Path) -> None:
    arguments = ("--list", "--mode=client", "--control-port=1", "--peer-cid=2")
    listed = vsock("run", program, *arguments, expect=None).stdout.splitlines()[1:]
    assert [(case.id, case.name) for case in CASES] == [
        (int(number), name) for number, name in (line.split("\t") for line in listed)
    ]


def test_the_readmes_counts_equal_the_tables() -> None:
    number = Counter(case.result for case in CASES)
    said = (
        f"{number['pass']} of {len(CASES)} cases pass, {number['does not apply']} do not apply, "
        "one does not pass"
    )
    assert number["fail"] == 1
    assert said in " ".join((TABLES.parents[2] / "README.md").read_text().split())


@pytest.mark.parametrize("client", [str(GUEST), "host"])
def test_cases_listed_as_passing_pass(vsock: Vsock, program: Path, client: str) -> None:
    passing = [case for case in CASES if case.result == "pass"]
    assert len(passing) >= 30
    said, well = run(vsock, program, client, passing)
    passed = {int(number) for number in re.findall(r"^(\d+) - .*\.\.\.ok$", said, re.M)}
    assert passed == {case.id for case in passing}, said
    assert well, said


@pytest.mark.parametrize("case", [case for case in CASES if case.result == "fail"], ids=str)
def test_cases_listed_as_failing_fail(vsock: Vsock, program: Path, case: Case) -> None:
    said, well = run(vsock, program, str(GUEST), [case])
    assert not well, f"it passes: say so in {TABLES.name}\n{said}"
