"""Build the files of a release into ``dist/``: wheel, sdist, SBOM and checksums.

Both distributions are built twice, from two exports of the commit in folders of their own, and must
have the same bytes.  The SBOM (CycloneDX) lists the package and the dependencies of ``vsock`` with
the versions that pip chooses at that time.  ``make release`` installs the tools and runs this.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path = ROOT) -> bytes:
    """Return the output of a command; exit with a message if the command fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"release: {' '.join(map(str, command))} failed with status {done.returncode}")
    return done.stdout


def export(target: Path) -> Path:
    """Write the files of the current commit into a new folder; return the folder."""
    run("git", "clone", "--quiet", "--no-local", ROOT, target)
    return target


def build(source: Path, target: Path) -> list[Path]:
    """Build wheel and sdist of a source tree into ``target``; return their paths."""
    options = ("build", "--target", "wheel", "--target", "sdist", "--directory", target)
    run(sys.executable, "-m", "hatchling", *options, cwd=source)
    return sorted(target.iterdir())


def differences(first: list[Path], second: list[Path]) -> list[str]:
    """Return the names of files that are not the same in two builds."""
    contents = [{path.name: path.read_bytes() for path in build} for build in (first, second)]
    names = contents[0].keys() | contents[1].keys()
    return sorted(name for name in names if contents[0].get(name) != contents[1].get(name))


def write_sbom(wheel: Path, work: Path, target: Path) -> None:
    """Write the SBOM of an environment that has the wheel and its dependencies alone."""
    environment = work / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # By name, so that pip does not record the path of the wheel on this machine.
    name = "==".join(wheel.name.split("-")[:2])
    run(python, "-m", "pip", "install", "--quiet", "--find-links", wheel.parent, name)
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", "pip")
    options = ("--pyproject", ROOT / "pyproject.toml", "--output-file", target)
    tool = Path(sys.executable).with_name("cyclonedx-py")
    run(tool, "environment", "--output-reproducible", *options, python)


def main() -> None:
    """Build, compare and describe a release of the current commit."""
    if run("git", "status", "--porcelain"):
        sys.exit("release: the working tree has changes that are not committed")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print("building twice ...", flush=True)
        builds = [build(export(work / name), work / f"{name}-dist") for name in ("one", "two")]
        if different := differences(*builds):
            sys.exit(f"release: the two builds differ: {', '.join(different)}")
        for path in builds[0]:
            shutil.copy(path, dist)
        (wheel,) = dist.glob("*.whl")
        print("listing the dependencies ...", flush=True)
        version = wheel.name.split("-")[1]
        write_sbom(wheel, work, dist / f"vsockets-{version}.cdx.json")
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in _files(dist)]
    (dist / "SHA256SUMS").write_text("".join(sums))
    for path in _files(dist):
        print(f"{path.stat().st_size:>9,}  dist/{path.name}")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


if __name__ == "__main__":
    main()
