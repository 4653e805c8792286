"""The distributions of a release: the same bytes from every build, and the right files in them."""

from __future__ import annotations

import os
import runpy
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
release = runpy.run_path(str(ROOT / "packaging" / "release.py"))

SOURCES = (".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "src")


def copy_sources(target: Path, mode: int, mtime: int) -> Path:
    """Copy the sources, with permissions and times that differ between checkouts."""
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    for path in target.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o100 | mode)
            os.utime(path, (mtime, mtime))
    return target


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    folder = tmp_path_factory.mktemp("release")
    first = copy_sources(folder / "one", 0o644, 1_700_000_000)
    second = copy_sources(folder / "another", 0o600, 1_800_000_000)
    return [release["build"](tree, folder / f"{tree.name}-dist") for tree in (first, second)]


def test_two_builds_have_the_same_bytes(builds: list[list[Path]]) -> None:
    assert {path.suffix for path in builds[0]} == {".whl", ".gz"}
    assert release["differences"](*builds) == []


def test_a_difference_is_found(builds: list[list[Path]], tmp_path: Path) -> None:
    changed = [Path(shutil.copy(path, tmp_path)) for path in builds[0]]
    changed[0].write_bytes(changed[0].read_bytes() + b"x")
    assert release["differences"](builds[0], changed) == [changed[0].name]
    assert release["differences"](builds[0], changed[1:]) == [changed[0].name]


def test_the_wheel_has_the_package_and_nothing_else(builds: list[list[Path]]) -> None:
    (wheel,) = (path for path in builds[0] if path.suffix == ".whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vsockets"}
    metadata = [name for name in names if ".dist-info/" in name]
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    for name in ("vsockets/__init__.py", "vsockets/py.typed", "vsockets/include/vmci_sockets.h"):
        assert name in names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_the_sdist_gives_the_same_wheel(builds: list[list[Path]], tmp_path: Path) -> None:
    (sdist,) = (path for path in builds[0] if path.suffix == ".gz")
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path)
    (tree,) = tmp_path.iterdir()
    again = release["build"](tree, tmp_path / "dist")
    wheels = [[path for path in build if path.suffix == ".whl"] for build in (again, builds[0])]
    assert release["differences"](*wheels) == []
