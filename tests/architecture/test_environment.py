"""The tests leave no trace, and need no particular shell and no compiler."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import c_compiler
import costs
import scheduling
import traces
from environments import debian_13, namespace, ordinary_user

TESTS = Path(traces.__file__).parent

#: A folder of tests that uses the same hooks.
CONFTEST = "from tests.conftest import pytest_sessionfinish, pytest_sessionstart\n"


def test_the_home_folder_is_not_the_users() -> None:
    assert Path.home() != Path(pwd.getpwuid(os.geteuid()).pw_dir)
    shell = "set -o history; HISTFILE=${HISTFILE-$HOME/.bash_history}; echo $HISTFILE"
    for command in (["bash", "-c", shell], ["sh", "-c", "echo $HOME/"]):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"{Path.home()}/")


def test_a_compiler_without_headers_is_missing(tmp_path: Path) -> None:
    """As with ``apt install --no-install-recommends gcc``."""
    c_compiler.require_compiler("gcc")
    compiler = tmp_path / "gcc-alone"
    compiler.write_text('#!/bin/sh\nexec gcc -nostdinc "$@"\n')
    compiler.chmod(0o755)
    with pytest.raises(pytest.skip.Exception, match="apt install libc6-dev"):
        c_compiler.compile_c("anything.c", compiler=str(compiler))
    with pytest.raises(pytest.skip.Exception, match="no-such-compiler is missing"):
        c_compiler.compile_c("anything.c", compiler="no-such-compiler")


@pytest.mark.parametrize("parallel", [(), ("-n", "1")], ids=["here", "workers"])
def test_a_file_left_in_the_tree_fails_the_run(tmp_path: Path, parallel: tuple[str, ...]) -> None:
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path[:0] = [{str(TESTS.parent)!r}, {str(TESTS)!r}]\n{CONFTEST}"
    )
    (tmp_path / "test_one.py").write_text(
        "import os\n"
        "def test_one():\n"
        "    if name := os.environ.get('LEAVE'): open(name, 'w').close()\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"
    }
    command = [sys.executable, "-m", "pytest", "-q", *parallel, str(tmp_path)]

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(LEAVE="trace.state")
    assert done.returncode == traces.LEFT
    assert f"ERROR: the tests have left in {tmp_path}: trace.state" in done.stdout


def test_signals_that_a_shell_ignores_reach_the_tests_programs(tmp_path: Path) -> None:
    """As in ``make test &`` in a script, or below ``nohup``."""
    (tmp_path / "test_one.py").write_text(
        "import signal, subprocess\n"
        "import conftest\n"
        "def test_one():\n"
        "    for number in signal.SIGINT, signal.SIGQUIT, signal.SIGHUP:\n"
        "        with subprocess.Popen(['sleep', '100']) as program:\n"
        "            program.send_signal(number)\n"
        "            assert program.wait(60) == -number\n"
    )
    done = subprocess.run(
        [
            *("env", "--ignore-signal=INT,QUIT,HUP", f"PYTHONPATH={TESTS}"),
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


@pytest.mark.parametrize("environment", [debian_13, ordinary_user])
def test_the_parts_of_other_environments_exist(environment: ModuleType) -> None:
    for part in (*environment.PARTS, *environment.OMITTED):
        assert (namespace.TREE / part).exists(), part


#: A test of a machine that others share, from the fixtures of tests/vm/conftest.py.
_SHARING = re.compile(r"def test_\w+\([^)]*(\bmachines: Machines|\bmachine: Machine)\b")


def test_one_worker_runs_the_files_that_share_machines() -> None:
    """Each of its workers would boot them otherwise."""
    grouped = {path for path in scheduling.GROUP_OF if path.startswith("tests/vm/")}
    for path in (TESTS / "vm").glob("test_*.py"):
        text = path.read_text()
        is_own = "def machine(" in text and "machines: Machines" not in text
        if _SHARING.search(text) and not is_own:
            assert f"tests/vm/{path.name}" in grouped, "add it to tests/scheduling.py"
    assert all((namespace.TREE / path).exists() for path in scheduling.GROUP_OF)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_dearest_files_are_named_at_the_end(tmp_path: Path, workers: str) -> None:
    (tmp_path / "conftest.py").write_text(
        "import costs\ndef pytest_configure(config): config.pluginmanager.register(costs.Costs())\n"
    )
    for number in range(costs.FILES_MIN):
        (tmp_path / f"test_{number}.py").write_text("def test_it(): pass\n")
    (tmp_path / "test_dear.py").write_text(
        "import os\n"
        "def test_it():\n"
        "    end = sum(os.times()[:2]) + 0.5\n"
        "    while sum(os.times()[:2]) < end: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", workers],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.partition("dearest files")[2].splitlines()[1:]
    files = [row.split()[2] for row in list(filter(None, rows))[: costs.DEAREST]]
    assert files[0] == "test_dear.py"
    assert len(set(files)) == costs.DEAREST
