"""``make test-recipes``: the shell steps of the recipes for CI services, from a clone.

They install from an index, which takes longer than other tests may; pytest finds this file by its
name only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from environments import containerfile
from environments.containerfile import SUITE
from vsockets.vm.apt import Unavailable

from .test_recipes import ACTION, GITLAB, ROOT

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of the commit."""
    command = ["git", "clone", "--quiet", "--local", str(ROOT), str(tmp_path / "clone")]
    subprocess.run(command, check=True)
    return tmp_path / "clone"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a job: no command of this project on its path."""
    ours = str(Path(sys.executable).parent)
    search = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != ours)
    base = str(Path(sys.base_prefix) / "bin")
    environment = {**os.environ, "PATH": f"{base}{os.pathsep}{search}"}
    environment |= {name: str(tmp_path / name.lower()) for name in ("GITHUB_PATH", "GITHUB_OUTPUT")}
    environment["RUNNER_TEMP"] = str(tmp_path)
    environment.pop("VIRTUAL_ENV", None)
    environment.pop("PYTHONPATH", None)
    return environment


def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a step as GitHub does, and return its output."""
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_action(clone: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    values = {"github.action_path": str(clone), "inputs.command": SUITE}
    output = ""
    for step in ACTION["runs"]["steps"]:
        if "run" not in step:
            continue
        for name, text in step["env"].items():
            environment[name] = re.sub(r"\$\{\{ (.*?) \}\}", lambda m: values[m[1]], text)
        output = run(step["run"], tmp_path, environment)
        added = Path(environment["GITHUB_PATH"]).read_text().split()
        environment["PATH"] = os.pathsep.join([*added, environment["PATH"]])
    assert output == "from guest 3\n"
    assert Path(environment["GITHUB_OUTPUT"]).read_text() == f"package={clone}\n"


def test_the_action_fails_as_its_command_does(
    clone: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (step,) = (s for s in ACTION["runs"]["steps"] if "COMMAND" in s.get("env", {}))
    environment |= {
        "COMMAND": "false; true",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    command = ["bash", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 1


def test_the_gitlab_job(clone: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "run-tests").write_text(f"#!/bin/sh\nset -e\n{SUITE}")
    (tmp_path / "run-tests").chmod(0o755)
    job = GITLAB[".vsockets"]
    steps = "\n".join([*job["before_script"], *GITLAB["test"]["script"]])
    environment |= {**job["variables"], "VSOCKETS": str(clone)}
    script = steps.replace("/tmp/vsockets", str(tmp_path / "venv"))  # other tests may use /tmp
    assert run(script, tmp_path, environment) == "from guest 3\n"


def test_the_containerfile(clone: Path, tmp_path: Path) -> None:
    """Run the second step in a copy of the root folder, which mmdebstrap makes for the first.

    ``make test-containers`` builds the image with Podman.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        base = containerfile.root_folder()
    except Unavailable as error:
        pytest.skip(str(error))
    root = tmp_path / "root"
    subprocess.run(["cp", "--archive", base, root], check=True)
    shutil.copy(containerfile.wheel(clone), root / "tmp")
    enter = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "chroot", root)
    search = "export PATH=/usr/local/bin:/usr/bin:/bin"
    mount = "mount -t proc proc /proc; mount -t tmpfs none /run"
    steps = f"{search}; {mount}; {containerfile.WHEEL}; vsock --version"
    done = subprocess.run(
        [*enter, "bash", "-ec", f"{steps}; vsock fabric -- bash -ec '{SUITE}'"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("from guest 3\n")
