"""``vsock run`` on a fabric for each module, and C programs to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import c_compiler
from cli.vsock import Vsock
from vsockets.cli.include_dir import INCLUDE
from vsockets.testing import PrivateFabric

PROGRAMS = Path(__file__).parent / "programs"

#: Compiles a program of ``programs/`` or a given path: (name, compiler's options) -> executable.
Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    """A vsockd that this module's tests share."""
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture(params=["notify", "trace"])
def interceptor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interceptor of ``vsock run``: every test passes with both, but for those marked so."""
    name: str = request.param
    if request.param not in os.environ.get("VSOCKETS_TEST_INTERCEPTORS", "notify trace"):
        pytest.skip("not among VSOCKETS_TEST_INTERCEPTORS")
    marker = request.node.get_closest_marker("notify_only")
    if name == "trace" and marker is not None:
        pytest.skip(marker.args[0])
    monkeypatch.setenv("VSOCKETS_INTERCEPTOR", name)
    return name


@pytest.fixture
def vsock(fabric: PrivateFabric, interceptor: str) -> Iterator[Vsock]:
    """The command line on the module's fabric; ends what a test left running."""
    with Vsock(fabric.folder) as vsock:
        yield vsock


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A C compiler; each program is compiled once."""
    folder = tmp_path_factory.mktemp("programs")
    made: dict[tuple[object, ...], Path] = {}

    def compile_one(source: str | Path, *options: str, compiler: str = "gcc") -> Path:
        path = PROGRAMS / source
        key = path, options, compiler
        if key not in made:
            program = folder / f"{path.stem}-{len(made)}"
            c_compiler.compile_c(f"-I{INCLUDE}", "-o", program, path, *options, compiler=compiler)
            made[key] = program
        return made[key]

    return compile_one
