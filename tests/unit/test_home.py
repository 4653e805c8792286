"""The user's home folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Prints the folders that depend on the home of a user without HOME, name and home.
WITHOUT_A_HOME = """
import os
from vsockets.model.home import home_folder
from vsockets.cli.options import state_file
from vsockets.daemon.configuration import default_configuration_folder
os.setgroups([])
os.setuid(54_321)
os.environ.clear()
print(default_configuration_folder(), state_file("nfs"), home_folder())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user without a name: needs root")
def test_a_user_without_a_home() -> None:
    """As a unit with DynamicUser=yes, or a container's user: programs start nevertheless."""
    command = [sys.executable, "-c", WITHOUT_A_HOME]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [
        "/nonexistent/.config/vsock",
        "/nonexistent/.local/state/vsock/nfs",
        "/nonexistent",
    ], done.stderr
