"""A virtual machine with Podman and an image: both are made of Debian's packages.

Podman and what it needs are those of Debian's testing suite, the first whose default profile
refuses AF_VSOCK.  The image is the root folder of :mod:`environments.debian_13`.  A third root
folder becomes the base image of ``ci/Containerfile`` (:meth:`PodmanMachine.import_base`).  The
three are disks below ``~/.cache/vsockets``; what a machine writes to them ends with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from environments import containerfile, debian_13
from environments.debian_root import make_disk, make_root
from vm import downloads
from vm.machine import PATIENCE, Machine
from vsockets.testing import PrivateFabric
from vsockets.vm import guest_image
from vsockets.vm.apt import Unavailable, cached

RELEASE = "forky"
PACKAGES = ("podman", "crun", "python3")

#: Where the image and the files for containers are in the machine.
IMAGE, FILES = "/srv", "/run/files"

#: Where the files of the Containerfile's base image are in the machine.
_BASE = "/mnt"

#: Storage of images, and the settings without which Podman reads none.
_STORAGE = "/run/storage"
_PREPARE = f"""\
set -e
mkdir -p /etc/containers /run/podman
echo '{{"default": [{{"type": "insecureAcceptAnything"}}]}}' >/etc/containers/policy.json
tar --create --directory={_BASE} --exclude=./etc/apt/sources.list* --exclude=./usr/share/doc \
    --exclude=./usr/share/locale --exclude=./usr/share/man . |
    TMPDIR=/run/podman podman --root={_STORAGE} import - {containerfile.IMAGE}
"""

_AGENT = Path(__file__).parents[1] / "vm/agent.py"

#: The last commands of the initrd: go on with the agent, on the disks.
_LAST = f"""\
set -e
for module in overlay virtio_blk; do insmod /modules/$module.ko; done
mkdir /new /dev/shm
mount -t ext4 /dev/vda /new
mount -t ext4 -o ro /dev/vdb /new{IMAGE}
mount -t ext4 -o ro /dev/vdc /new{_BASE}
for folder in new/run new/tmp dev/shm; do mount -t tmpfs none /$folder; done
mv /agent.py /files /new/run
stty -F /dev/ttyS1 raw -echo
for folder in dev proc sys; do mount -o move /$folder /new/$folder; done
mount -t cgroup2 none /new/sys/fs/cgroup
exec switch_root /new /usr/bin/python3 -u -S /run/agent.py </new/dev/ttyS1 >/new/dev/ttyS1 \\
    2>/new/dev/console
"""


class Done(NamedTuple):
    """The result of a command in the machine."""

    status: int
    output: str
    errors: str


class PodmanMachine:
    """A running machine that runs commands in containers of Podman's."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def run(self, *command: str) -> Done:
        """Run a command in the machine and return its result."""
        source = """
        import subprocess
        done = subprocess.run(command, capture_output=True, text=True)
        result = done.returncode, done.stdout, done.stderr
        """
        return Done(*self._machine.run(source, 4 * PATIENCE, command=command))

    def contain(self, *command: str, options: tuple[str, ...] = ()) -> Done:
        """Run a command in a new container: the default profile, and no network."""
        podman = ("podman", "run", "--rm", "--network=none", "--cgroups=disabled")
        volume = ("--volume", f"{FILES}:{FILES}", "--env", f"PYTHONPATH={FILES}/src")
        search = ("--env", "PATH=/opt/venv/bin:/usr/bin:/bin")
        return self.run(*podman, *volume, *search, *options, "--rootfs", f"{IMAGE}:O", *command)

    def import_base(self) -> Done:
        """Import the base image of the Containerfile, under its name.

        The image has the packages that the Containerfile installs, and no sources of packages, so
        that ``apt-get`` succeeds without a network.
        """
        return self.run("sh", "-c", _PREPARE)

    def with_images(self, command: str, *arguments: str) -> Done:
        """Run a command of Podman's with the imported and the built images."""
        podman = ("env", "TMPDIR=/run/podman", "podman", f"--root={_STORAGE}", command)
        return self.run(*podman, *arguments)


@contextmanager
def running(folder: Path, files: Mapping[str, bytes]) -> Iterator[PodmanMachine]:
    """Run the machine, with ``files`` below :data:`FILES`.  Raises Unavailable."""
    kernel = downloads.kernel("stable")
    downloads.qemu()
    disks = _podman(), _image(), _base()
    inside = {f"/files/{name}": data for name, data in files.items()}
    for path in sorted(guest_image.PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            inside[f"/files/src/vsockets/{path.relative_to(guest_image.PACKAGE)}"] = (
                path.read_bytes()
            )
    inside["/agent.py"] = _AGENT.read_bytes()
    initrd = folder / "initrd"
    initrd.write_bytes(
        guest_image.build_initramfs(
            kernel, downloads.userland(), "virtio", _LAST, inside, ("overlay", "virtio_blk")
        )
    )
    drives = [f"file={disk},format=raw,if=virtio,snapshot=on" for disk in disks]
    arguments = [word for drive in drives for word in ("-drive", drive)]
    with PrivateFabric() as fabric:
        machine = Machine(
            fabric, kernel, initrd, folder, device="virtio", memory=2048, arguments=arguments
        )
        with machine:
            yield PodmanMachine(machine)


def _podman() -> Path:
    """Return the disk of the machine's own system, made if need be."""

    def fill(folder: Path) -> None:
        if os.geteuid() != 0:
            raise Unavailable("needs root")
        root = folder / "root"
        make_root(root, RELEASE, PACKAGES, "--mode=root", "--variant=essential")
        make_disk(folder / "disk", root)
        shutil.rmtree(root)

    identity = hashlib.sha256(json.dumps([RELEASE, PACKAGES]).encode()).hexdigest()[:12]
    return cached(f"podman-{identity}", fill) / "disk"


def _image() -> Path:
    """Return the disk with the image, made if need be."""
    return _disk_of(debian_13.root_folder())


def _base() -> Path:
    """Return the disk with the Containerfile's base image, made if need be."""
    return _disk_of(containerfile.root_folder())


def _disk_of(root: Path) -> Path:
    return cached(f"{root.name}-disk", lambda folder: make_disk(folder / "disk", root)) / "disk"
