"""The Debian package's files agree with the project; ``make debian-package`` builds and uses it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from vsockets.daemon import configuration

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "packaging" / "debian"

with open(ROOT / "pyproject.toml", "rb") as file:
    PROJECT = tomllib.load(file)["project"]


def test_the_version_is_the_projects() -> None:
    newest = re.findall(r"^vsockets \((.*)\)", (FOLDER / "changelog").read_text(), re.MULTILINE)[0]
    assert newest == PROJECT["version"]


def test_it_builds_with_every_requirement_of_the_command() -> None:
    control = (FOLDER / "control").read_text()
    for requirement in PROJECT["dependencies"]:
        name = re.split(r"[^\w-]", requirement)[0]
        assert f"python3-{name}" in control


def test_every_unit_is_installed() -> None:
    rules = (FOLDER / "rules").read_text()
    for unit in (ROOT / "packaging" / "systemd").iterdir():
        assert unit.name in rules


def test_the_configuration_is_valid_also_uncommented(tmp_path: Path) -> None:
    text = (FOLDER / "etc" / "vsock.toml").read_text()
    examples = re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)
    assert examples != text
    # A user and a group that exist everywhere.
    examples = examples.replace('"alice"', '"root"').replace('"vsock"', '"root"')
    for number, contents in enumerate((text, examples)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vsock.toml").write_text(contents)
        loaded = configuration.load(folder)
        assert len(loaded.contexts) == number
