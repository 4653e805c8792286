"""``ci/Containerfile``: its steps, the root folder that its first one makes, and its wheel."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from vsockets.vm.apt import cached

from .debian_root import make_root

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ci/Containerfile"

_TEXT = FILE.read_text().replace("\\\n", "")
#: The base image, its release of Debian, and the shell steps.
(IMAGE,) = re.findall(r"^FROM (\S+)$", _TEXT, re.MULTILINE)
(_RELEASE,) = re.findall(r"debian:(\w+)-slim$", IMAGE)
INSTALL, WHEEL = re.findall(r"^RUN (.*)$", _TEXT, re.MULTILINE)
(_NAMES,) = re.findall(r"--no-install-recommends ([\w -]+?) +&&", INSTALL)
#: The pattern of the file that the image gets.
(COPIED,) = re.findall(r"^COPY (\S+) /tmp/$", _TEXT, re.MULTILINE)

#: A suite for ``vsock fabric`` in the image: a client in guest 3 and the server of the test.
SUITE = """\
vsock run --cid 3 -- vsock listen --exec "echo from guest 3" 5000 &
vsock connect --wait 20 3 5000
"""


def root_folder() -> Path:
    """Return a root folder with the packages of the first step, made if it is missing.

    Raises Unavailable.
    """
    digest = hashlib.sha256(f"{_RELEASE} {_NAMES}".encode()).hexdigest()[:12]
    return cached(
        f"recipe-{digest}",
        lambda folder: make_root(
            folder, _RELEASE, _NAMES.split(), "--mode=root", "--variant=minbase"
        ),
    )


def wheel(tree: Path) -> Path:
    """Build the wheel of a clone as the Containerfile's comment does; return its path."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tree / "dist"), str(tree)], check=True)
    (built,) = tree.glob(COPIED)
    return built
