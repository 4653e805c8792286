"""``tests/library``, run in a guest with ``VSOCKETS_TRANSPORT=kernel``."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets import VMADDR_CID_LOCAL

from .conftest import Machines, unload
from .image import LOOPBACK
from .machine import Machine
from .remote import CallExecutor

pytestmark = pytest.mark.timeout(400)

TESTS = Path(__file__).parents[1]

#: The modules of pytest, all in pure Python.
PYTEST = (
    *("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py"),
    "pytest_timeout",
)

#: Tests that compare the fabric with a kernel, use supervised programs, or make calls that vsockd
#: does not answer.
_OF_THE_FABRIC = ("test_answers.py", "test_full_backlog.py", "test_unmodified.py")

#: Timeout in seconds for all tests.
_RUN = 350.0

_LOAD = """
for name in modules:
    if os.path.exists(f"/modules/{name}.ko") and not os.path.exists(f"/sys/module/{name}"):
        assert not os.system(f"insmod /modules/{name}.ko")
"""

_RUN_TESTS = """
import subprocess, sys
done = subprocess.run(
    [sys.executable, "-m", "pytest", "-p", "vm.kernel_fabric", "-p", "pytest_timeout", *arguments],
    cwd="/tests",
    env={**os.environ, "PYTHONPATH": "/tests", "VSOCKETS_TRANSPORT": "kernel", **environment},
    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
)
result = done.returncode, done.stdout
"""


def files() -> dict[str, bytes]:
    """Return all files that the guest needs, by path."""
    found = {"/tests/pytest.ini": b""}

    def add(path: Path, name: str) -> None:
        found[f"/tests/{name}"] = path.read_bytes()

    for name in PYTEST:
        path = Path(str(importlib.import_module(name).__file__))
        if path.name == "__init__.py":
            for file in path.parent.rglob("*.py"):
                add(file, f"{name}/{file.relative_to(path.parent)}")
        else:
            add(path, path.name)
    for file in TESTS.glob("library/*.py"):
        if file.name not in _OF_THE_FABRIC:
            add(file, f"library/{file.name}")
    for name in ("__init__.py", "kernel_fabric.py", "remote.py"):
        add(Path(__file__).with_name(name), f"vm/{name}")
    return found


@pytest.fixture(scope="module")
def machine(machines: Machines) -> Iterator[Machine]:
    machine = machines.get("newest", "virtio")
    machine.put(files())
    machine.run(_LOAD, modules=LOOPBACK)
    yield machine
    unload(machine, "vsock_loopback")


def run(machine: Machine, **environment: str) -> None:
    """Run all tests."""
    arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", "--timeout=60", "library"]
    status, output = machine.run(
        _RUN_TESTS, timeout=_RUN, arguments=arguments, environment=environment
    )
    assert status == 0, output


def test_on_the_loopback_of_the_kernel(machine: Machine) -> None:
    run(machine, VSOCKETS_TEST_CID=str(VMADDR_CID_LOCAL))


def test_to_the_host_of_the_fabric(machine: Machine) -> None:
    with contextlib.closing(CallExecutor(machine.host)) as executor:
        run(machine, VSOCKETS_TEST_HOST=str(executor.port))
