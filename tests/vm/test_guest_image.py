"""A guest's initial RAM disk, with packages in the layouts of two distributions."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vsockets.vm import guest_image
from vsockets.vm.guest_image import Archive, Userland

LOADER = "ld-linux-x86-64.so.2"

#: Locations of busybox, the C library and the loader's link in packages.
LAYOUTS = {
    "Debian 12": ("bin/busybox", "lib/x86_64-linux-gnu", "lib64"),
    "Debian 13": ("usr/bin/busybox", "usr/lib/x86_64-linux-gnu", "usr/lib64"),
}


def unpack(archive: bytes, folder: Path) -> None:
    """Unpack a cpio(5) archive in "newc" format, file by file as the kernel does."""
    at = 0
    while True:
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        at += 110
        name = archive[at : at + length - 1].decode()
        at = (at + length + 3) // 4 * 4
        data = archive[at : at + size]
        at = (at + size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return
        path = folder / name
        if stat.S_ISDIR(mode):
            path.mkdir()
        elif stat.S_ISLNK(mode):
            path.symlink_to(data.decode())
        else:
            path.write_bytes(data)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_files_are_where_programs_look_for_them(
    tmp_path: Path, layout: tuple[str, str, str]
) -> None:
    busybox, libraries, loader = layout
    packages, guest = tmp_path / "packages", tmp_path / "guest"
    for name in (
        busybox,
        f"{libraries}/libc.so.6",
        f"{libraries}/{LOADER}",
        "usr/lib/python3/a.py",
    ):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(name)
    (packages / loader).mkdir()
    (packages / loader / LOADER).symlink_to("wherever")
    userland = Userland.__new__(Userland)
    userland.root = packages
    archive = Archive()
    guest_image.add_directories(archive)
    userland.add_to(archive)
    archive.add_with_folders("/lib/x86_64-linux-gnu/more.so", stat.S_IFREG | 0o755, b"more")
    guest.mkdir()
    unpack(archive.finish(), guest)
    assert (guest / "bin/busybox").read_text() == busybox
    assert (guest / "lib/x86_64-linux-gnu/more.so").read_text() == "more"
    assert (guest / "usr/lib/python3/a.py").exists()
    target = os.readlink(guest / "lib64" / LOADER).removeprefix("/")
    assert (guest / target).read_text() == f"{libraries}/{LOADER}"
    assert (guest / target).with_name("libc.so.6").exists()
