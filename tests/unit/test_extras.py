"""Instructions for installing extras from the origin of this package, which is in no index."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

from vsockets import extras

ROOT = Path(__file__).parents[2]


def test_named_extras_exist() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"]
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    sources += [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    sources.append((ROOT / "README.md").read_text())
    named = {name for text in sources for name in re.findall(r"how_to_install\(['\"](\w+)", text)}
    named |= {name for text in sources for name in re.findall(r"pip install '\.\[(\w+)\]'", text)}
    assert {"amqp", "nfs", "plot"} <= named <= known.keys()
    assert not any("'vsockets[" in text for text in sources)  # not in an index


class Distribution:
    def __init__(self, url: str) -> None:
        self._url = url

    def read_text(self, name: str) -> str:
        assert name == "direct_url.json"
        return json.dumps({"url": self._url})


def test_install_from_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution(clone.as_uri()))
    assert extras.how_to_install("amqp") == f"pip install '{clone}[amqp]'"
    assert extras.how_to_install() == f"pip install '{clone}'"


def test_install_without_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "lib/python3/vsockets/extras.py"))
    for url in ("https://example.org/vsockets.whl", (tmp_path / "removed").as_uri()):
        found = Distribution(url)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _, found=found: found)
        assert extras.how_to_install("amqp") == "pip install '.[amqp]' in a clone of vsockets"
