"""Run a short form of the tests on Debian 13, with its Python 3.13 and its libraries.

The system is a root folder that mmdebstrap makes once, below ``~/.cache/vsockets``, from this
machine's mirror of Debian.  Python's packages are downloaded here, with this machine's
configuration of pip, and installed there without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from vsockets.vm.apt import Unavailable, cached, run

from . import namespace
from .debian_root import make_root

RELEASE, PYTHON = "trixie", "3.13"

#: What is tested: all that is Python's business, and supervised programs.
PARTS = (
    *("tests/unit", "tests/linux", "tests/protocol", "tests/eventloop", "tests/fabric"),
    *("tests/library", "tests/daemon/test_start_and_stop.py", "tests/daemon/test_isolation.py"),
    *("tests/daemon/test_descriptor_abuse.py", "tests/supervisor", "tests/nfs/test_service.py"),
    "tests/containers",
)

#: Files below PARTS that test vsockd and C programs, whatever Python the supervisor is run by.
OMITTED = (
    *("tests/supervisor/test_answers.py", "tests/supervisor/test_filter.py"),
    "tests/containers/test_programs.py",
)

#: Debian's packages beside the essential ones.
PACKAGES = ("python3", "python3-venv", "gcc", "libc6-dev", "socat", "iproute2", "procps")

#: The requirements of pyproject.toml that these parts need.
REQUIREMENTS = (
    *("click", "rich", "h11", "h2", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist"),
    *("pyte", "prometheus-client"),
)

#: Where the working tree and Python's packages are, there.
_TREE, _VENV = Path("/vsockets"), Path("/opt/venv")

#: Makes the working folder the root folder and runs a program in the folder ``$0`` there.  In a
#: chroot nobody could make a user namespace.
_ENTER = 'pivot_root . .; umount --lazy .; cd "$0"; exec "$@"'


def main() -> int:
    """Return the exit status: 0 if the tests pass or cannot run here."""
    if namespace.is_within():
        return _within(Path(sys.argv[1]), Path(sys.argv[2]))
    problem = namespace.problem()
    if not problem and shutil.which("mmdebstrap") is None:
        problem = "mmdebstrap is missing: apt install mmdebstrap"
    try:
        root = None if problem else root_folder()
    except Unavailable as error:
        problem = str(error)
    if problem or root is None:
        print(f"Debian 13: skipped: {problem}")
        return 0
    with tempfile.TemporaryDirectory(prefix="d13-", dir="/tmp") as scratch:
        return namespace.enter(__spec__.name, str(root), scratch, *sys.argv[1:])


def root_folder() -> Path:
    """Return the root folder, made if need be.  Raises Unavailable."""
    requirements = _requirements()
    identity = json.dumps([RELEASE, PACKAGES, requirements])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]

    def fill(folder: Path) -> None:
        print("Debian 13: making its root folder; about two minutes, the first time", flush=True)
        make_root(folder, RELEASE, PACKAGES, "--mode=root", "--variant=minbase")
        wheels = folder / "var/wheels"
        wheels.mkdir()
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        target = ("--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp")
        run(*pip, "download", "--quiet", *target, "--dest", str(wheels), *requirements)
        run("chroot", str(folder), "python3", "-m", "venv", str(_VENV))
        install = ("install", "--quiet", "--no-index", "--find-links", "/var/wheels")
        run("chroot", str(folder), str(_VENV / "bin/pip"), *install, *requirements)
        shutil.rmtree(wheels)
        (folder / _TREE.relative_to("/")).mkdir()

    return cached(f"debian-13-{digest}", fill)


def _requirements() -> list[str]:
    """Return the lines of pyproject.toml for :data:`REQUIREMENTS`."""
    with open(namespace.TREE / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = {re.split(r"[^\w-]", line)[0]: line for group in groups for line in group}
    return [lines[name] for name in REQUIREMENTS]


def _within(root: Path, scratch: Path) -> int:
    """Set up the namespace and run the tests there."""
    namespace.bind(root, root)  # so that it can be mounted upon, and read-only as a whole
    namespace.bind(namespace.TREE, root / _TREE.relative_to("/"), read_only=True)
    for name in ("proc", "sys", "dev"):
        namespace.bind(Path("/", name), root / name)
    for name in ("tmp", "run", "root"):
        folder = scratch / name
        folder.mkdir()
        namespace.bind(folder, root / name)
    (scratch / "tmp").chmod(0o1777)
    environment = {
        "HOME": "/root",
        "VSOCKETS_TEST_INTERCEPTORS": "notify",  # a short form
        "HYPOTHESIS_STORAGE_DIRECTORY": "/root/hypothesis",
        "LANG": "C.UTF-8",
        "PATH": namespace.PATH,
        "PYTHONPYCACHEPREFIX": "/tmp/bytecode",  # the working tree is read-only
        "PYTEST_PLUGINS": "vsockets.testing.plugin",  # of a package that is not installed
        "PYTHONPATH": str(_TREE / "src"),
        **{name: os.environ[name] for name in ("CI",) if name in os.environ},
    }
    parts = sys.argv[3:] or PARTS
    command = [
        *("sh", "-ec", _ENTER, str(_TREE), str(_VENV / "bin/python"), "tests/retry.py"),
        *("-p", "no:cacheprovider", "--numprocesses", namespace.WORKERS, "--dist", "loadfile"),
        *(f"--ignore={path}" for path in OMITTED if path not in parts),
        *("-rf", *parts),
    ]
    print("\nDebian 13: running", *parts, flush=True)
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
