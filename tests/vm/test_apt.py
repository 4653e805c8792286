"""Packages, downloaded by the machine's apt with sources of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsockets.vm import apt
from vsockets.vm.apt import DEBIAN, Suite, Unavailable

from . import downloads

OTHERS = """\
deb [trusted=yes] http://127.0.0.1/linux/debian bookworm stable
deb [trusted=yes] http://127.0.0.1/debian-security bookworm-security main
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources.list of an apt without package lists, as in a container."""
    (tmp_path / "etc/apt").mkdir(parents=True)
    (tmp_path / "var/lib/apt/lists/partial").mkdir(parents=True)
    (tmp_path / "status").touch()
    configuration = tmp_path / "apt.conf"
    configuration.write_text(
        f'Dir "{tmp_path}";\nDir::State::status "{tmp_path}/status";\nAPT::Architecture "amd64";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    return tmp_path / "etc/apt/sources.list"


def test_mirror_of_a_machine_without_package_lists(sources: Path) -> None:
    sources.write_text(f"{OTHERS}deb [trusted=yes] http://127.0.0.1/mirror/debian trixie main\n")
    assert Suite(DEBIAN, "trixie").mirror() == "http://127.0.0.1/mirror/debian"


def test_missing_mirror(sources: Path) -> None:
    sources.write_text(OTHERS)
    with pytest.raises(Unavailable, match="apt has no mirror of Debian"):
        Suite(DEBIAN, "trixie").mirror()


def test_unavailable_package_is_not_a_failure() -> None:
    error = Unavailable(
        "/x/ganesha.nfsd -v: /x/ganesha.nfsd: error while loading shared libraries: "
        "libdbus-1.so.3: cannot open shared object file: No such file or directory"
    )
    line = downloads.unavailable_line("nfs-ganesha", error)
    assert line.endswith("tests that need it are skipped (this machine has no libdbus-1.so.3)")
    assert "error" not in line


def test_package_lists_are_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompressed, the lists of the four suites of these tests took half a gigabyte."""
    try:
        downloads.qemu()
    except Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(apt, "CACHE", tmp_path)
    suite = Suite(DEBIAN, "bookworm")
    assert suite.with_dependencies("busybox-static") == ["busybox-static"]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 20 << 20
