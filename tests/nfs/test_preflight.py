"""The errors of a mount whose requirements are missing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vsockets.extras import how_to_install
from vsockets.nfs import preflight


@pytest.fixture
def pyfuse3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that can be imported as pyfuse3, on any machine."""
    monkeypatch.setitem(sys.modules, "pyfuse3", preflight)


def test_missing_pyfuse3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    expected = f"pyfuse3: {how_to_install('nfs')} "
    monkeypatch.setattr(sys, "base_prefix", "/usr")  # apt's packages are invisible in a venv
    with pytest.raises(OSError, match=re.escape(expected)):
        preflight.check()
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    with pytest.raises(OSError, match="apt install python3-pyfuse3, or pip install"):
        preflight.check()


@pytest.mark.usefixtures("pyfuse3")
def test_kernel_without_fuse(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="modprobe fuse, or use a kernel") as missing:
        preflight.check(str(tmp_path / "fuse"))
    assert missing.value.errno == errno.ENOENT


@pytest.mark.usefixtures("pyfuse3")
def test_user_other_than_root_needs_fusermount3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(preflight, "_has_no_new_privileges", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="apt install fuse3"):
        preflight.check("/dev/null")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    preflight.check("/dev/null")


_NO_NEW_PRIVILEGES = """
import ctypes, os, shutil, sys
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, as vsock run by an ordinary user
os.geteuid = lambda: 1000
shutil.which = lambda name: "/bin/" + name
from vsockets.nfs import preflight
sys.modules["pyfuse3"] = preflight
try:
    preflight.check("/dev/null")
except OSError as error:
    print(error.strerror)
"""


def test_no_new_privs_of_vsock_run_is_reported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NO_NEW_PRIVILEGES],
        env={**os.environ, "VSOCKETS_CONTEXT": "/run/vsock/3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "fusermount3's set-user-ID bit" in done.stdout, done
    assert "outside of vsock run, with VSOCKETS_CONTEXT=/run/vsock/3" in done.stdout
