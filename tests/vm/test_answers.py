"""The table of AF_VSOCK's results, recreated in a guest and compared with the committed one.

Streams and seqpackets use the kernel's loopback; datagrams and the pending connect use the VMCI
device, since no other transport supports datagrams and the loopback completes a connect at once.
``VSOCKETS_WRITE_TABLE=1`` writes the table.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import answers
from vsockets import VMADDR_CID_HOST, VMADDR_CID_LOCAL
from vsockets.testing import PrivateFabric

from .conftest import Machines, unload
from .image import LOOPBACK
from .machine import Machine

pytestmark = pytest.mark.timeout(300)

_HEADER = """\
# What AF_VSOCK answers, call by call: the answer, and the states of the socket that give it.
# Linux {}
# Taken in a guest by tests/vm/test_answers.py, with tests/supervisor/programs/answers.c.
"""

_LOAD = """
for name in modules:
    if os.path.exists(f"/modules/{name}.ko") and not os.path.exists(f"/sys/module/{name}"):
        assert not os.system(f"insmod /modules/{name}.ko")
result = os.uname()[2]
"""

_RUN = """
import subprocess
done = subprocess.run(["/answers", *arguments], input="\\n", capture_output=True, text=True)
assert done.returncode == 0, done.stderr
result = done.stdout
"""


def collect(machine: Machine, fabric: PrivateFabric) -> str:
    """Return the program's output in the guest."""

    def run(*arguments: object) -> str:
        return str(machine.run(_RUN, arguments=[*map(str, arguments)]))

    printed = [run(kind, VMADDR_CID_LOCAL) for kind in ("stream", "seqpacket")]
    printed.append(run("dgram", machine.cid))
    os.kill(fabric.pid, signal.SIGSTOP)
    try:
        printed.append(run("stream", VMADDR_CID_HOST, 5000))
    finally:
        os.kill(fabric.pid, signal.SIGCONT)
    return "".join(printed)


def test_table_matches_a_kernel(
    machines: Machines, fabric_of_machines: PrivateFabric, tmp_path: Path
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc not found: apt install the packages of .ci/run")
    program = answers.compile_program(tmp_path)
    machine = machines.get("newest")
    machine.put({"/answers": program.read_bytes()})
    release = machine.run(_LOAD, modules=LOOPBACK)
    found = answers.parse(collect(machine, fabric_of_machines))
    unload(machine, *reversed(LOOPBACK))
    if os.environ.get("VSOCKETS_WRITE_TABLE"):
        answers.TABLE.write_text(_HEADER.format(release) + answers.render(found))
    assert answers.read_table(answers.render(found)) == found
    assert answers.differences(answers.read_table(), found) == {}
