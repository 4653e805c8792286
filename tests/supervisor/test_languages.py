"""Programs in Go and Rust: static, with raw system calls, threads and their own event loops; and
gRPC's C++ library, which has an event loop of its own as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from c_compiler import require_compiler
from cli.vsock import Vsock

from .conftest import PROGRAMS, Compile

CONNECTIONS = 8
COMPILERS = {
    "go": ("go", "build", "-o"),
    "rs": ("rustc", "--edition=2021", "-D", "warnings", "-C", "target-feature=+crt-static", "-o"),
}
#: Go without downloads and the user's settings, and with a cache of its own.
GO = {
    "CGO_ENABLED": "0",
    "GO111MODULE": "off",
    "GOFLAGS": "",
    "GOTOOLCHAIN": "local",
    "GOCACHE": os.path.expanduser("~/.cache/vsockets/go-build"),
}

Echo = Callable[[str], Path]


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Echo:
    """``programs/echo`` in one language, compiled once and linked statically."""
    folder = tmp_path_factory.mktemp("echo")

    def compile_one(language: str) -> Path:
        made = folder / language
        compiler, *options = COMPILERS[language]
        if shutil.which(compiler) is None:
            pytest.skip(f"no {compiler}: apt install what .ci/run does")
        if language == "rs":
            require_compiler("cc")  # as linker
        if not made.exists():
            done = subprocess.run(
                [compiler, *options, made, PROGRAMS / f"echo.{language}"],
                env={**os.environ, **GO},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            headers = subprocess.run(["readelf", "-l", made], capture_output=True, check=True)
            assert b"INTERP" not in headers.stdout
        return made

    return compile_one


@pytest.mark.parametrize(("server", "client"), [("host", "90"), ("91", "host")])
@pytest.mark.parametrize(("serves", "calls"), [("go", "rs"), ("rs", "go")])
def test_an_echo_service_serves_its_clients(
    vsock: Vsock, echo: Echo, serves: str, calls: str, server: str, client: str
) -> None:
    serving = vsock.start("run", "--cid", server, "--", echo(serves), "serve", CONNECTIONS)
    port = serving.read_line()
    cid = {"host": "2"}.get(server, server)
    calling = vsock("run", "--cid", client, "--", echo(calls), "call", cid, port, CONNECTIONS)
    assert calling.stdout == "echoed\n"
    assert calling.stderr == ""
    assert serving.finish()[1] == ""


@pytest.mark.parametrize(("server", "client"), [("host", "92"), ("92", "host")])
def test_a_grpc_call_succeeds(vsock: Vsock, compile_c: Compile, server: str, client: str) -> None:
    if not Path("/usr/include/grpcpp/server_posix.h").exists():
        pytest.skip("no libgrpc++-dev: apt install what .ci/run does")
    libraries = ("-Wl,--copy-dt-needed-entries", "-lgrpc++", "-lgrpc", "-lgpr")
    program = compile_c("grpc.cc", *libraries, compiler="g++")
    serving = vsock.start("run", "--cid", server, "--", program, "serve")
    port = serving.read_line()
    cid = {"host": "2"}.get(server, server)
    assert vsock("run", "--cid", client, "--", program, "call", cid, port).stdout == "3000000\n"
    assert serving.finish()[0] == b"/vsockets/Twice\n"
