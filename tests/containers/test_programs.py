"""Programs of other languages, tools and the kernel's tests below Docker's default profile."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from c_compiler import compile_c, require_compiler
from conformance.kernel_suite import CACHE, Unavailable, table, vsock_test
from vsockets.cli.include_dir import INCLUDE

from .test_run import PROGRAMS, contained

#: A connect that case 33 has interrupted may arrive at the next case's server, on a busy machine.
INTERRUPTING = 33
PASSING = [
    case
    for case in table("The Linux kernel's own vsock tests")
    if case.result == "pass" and case.id != INTERRUPTING
]

#: A service and its client, in each direction; PROGRAM prints its port.
SERVE_AND_CALL = """
for pair in "host 2 92" "93 93 host"; do
    set -- $pair
    mkfifo /tmp/port.$1
    exec 3<>/tmp/port.$1  # the server may print more
    $vsock run --cid $1 -- PROGRAM serve ARGUMENT >&3 &
    read port <&3
    $vsock run --cid $3 -- PROGRAM call $2 $port ARGUMENT
    wait $!
done
"""

NCAT = """
$vsock run --cid host -- ncat --vsock -l 7000 >/tmp/received &
until $vsock ls 2>/tmp/ls | grep -q 7000; do :; done
echo "by ncat" | $vsock run -- ncat --vsock --send-only 2 7000
wait $!
cat /tmp/received
"""

#: Both directions at once, in two fabrics: most cases wait.  Each client waits for its server.
KERNEL_SUITE = """
run() {
    export VSOCKETS_DIR=/tmp/fabric.$1
    $vsock context add 90 >/dev/null
    $vsock run --cid $1 -- PROGRAM --mode=server --peer-cid=$4 --control-port=$5 CASES 2>&1 &
    until grep -q ":$(printf %04X $5) .* 0A " /proc/net/tcp; do :; done
    $vsock run --cid $3 -- PROGRAM --mode=client --control-host=127.0.0.1 --peer-cid=$2 \
        --control-port=$5 CASES >/tmp/client.$1 2>/tmp/errors.$1 || echo "client of $1 failed"
    wait $! || echo "server in $1 failed"
}
run host 2 90 90 7001 >/tmp/server.host &
run 90 90 host 2 7002 >/tmp/server.90
wait
grep -h " failed$" /tmp/server.*
cat /tmp/client.*
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose programs every user may execute."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def below_docker(folder: Path, script: str) -> list[str]:
    """Run a script in a container of Docker's; return the lines of its output."""
    lines, errors = contained("docker", (), script, "--keep", str(folder))
    assert errors == []
    return lines


def test_a_static_rust_program_works(folder: Path) -> None:
    if shutil.which("rustc") is None:
        pytest.skip("no rustc: apt install what .ci/run does")
    require_compiler("cc")  # as linker
    command = ("rustc", "--edition=2021", "-C", "target-feature=+crt-static", "-o")
    subprocess.run((*command, folder / "echo", PROGRAMS / "echo.rs"), check=True)
    script = SERVE_AND_CALL.replace("PROGRAM", f"{folder}/echo").replace("ARGUMENT", "4")
    assert below_docker(folder, script) == ["echoed"] * 2


def test_grpc_in_cplusplus_works(folder: Path) -> None:
    if not Path("/usr/include/grpcpp/server_posix.h").exists():
        pytest.skip("no libgrpc++-dev: apt install what .ci/run does")
    libraries = ("-Wl,--copy-dt-needed-entries", "-lgrpc++", "-lgrpc", "-lgpr")
    compile_c(
        "-I", INCLUDE, "-o", folder / "grpc", PROGRAMS / "grpc.cc", *libraries, compiler="g++"
    )
    script = SERVE_AND_CALL.replace("PROGRAM", f"{folder}/grpc").replace("ARGUMENT", "")
    assert below_docker(folder, script) == ["3000000"] * 2


def test_ncat_works(folder: Path) -> None:
    if shutil.which("ncat") is None:
        pytest.skip("no ncat: apt install what .ci/run does")
    assert below_docker(folder, NCAT) == ["by ncat"]


@pytest.mark.timeout(300)
def test_the_kernels_tests_pass_in_both_directions(folder: Path) -> None:
    if not (CACHE / "kernel").exists():  # Debian 13's: it has no cache, and the source is large
        pytest.skip("the kernel's tests are had by tests/conformance")
    try:
        program = vsock_test()
    except Unavailable as reason:
        pytest.skip(f"the kernel's tests cannot be had: {reason}")
    shutil.copy(program, folder / "vsock_test")
    cases = " ".join(f"--pick={case.id}" for case in PASSING)
    script = KERNEL_SUITE.replace("PROGRAM", f"{folder}/vsock_test").replace("CASES", cases)
    said = below_docker(folder, script)
    passed = re.findall(r"^(\d+) - .*\.\.\.ok$", "\n".join(said), re.M)
    assert sorted(map(int, passed)) == sorted([case.id for case in PASSING] * 2), said
    assert not [line for line in said if line.endswith(" failed")], said
