"""Settings of forwards from a TOML file; ``docs/forward.md`` has the schema."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..model.locator import parse_locator
from ..toml.tables import ConfigurationError, Table, kind, read_toml, shown
from .limits import FORWARD_CONNECTIONS_MAX
from .rules import HostRule, PeerRule
from .settings import Settings

__all__ = ["ConfigurationError", "load"]

_Value = TypeVar("_Value")

_KEYS = (
    *("from", "to", "allow", "allow_host"),
    *("idle", "connect_timeout", "wait", "max_connections"),
)


def load(path: Path) -> list[Settings]:
    """Return the settings of the file's forwards, at least one.

    Raises ConfigurationError for the first mistake.
    """
    root = read_toml(path)
    root.require_known("forward")
    tables = root.tables("forward")
    if not tables:
        raise root.error("missing [[forward]] (expected at least one)")
    found: dict[Any, Table] = {}
    forwards = []
    for table in tables:
        settings = _settings(table)
        if settings.source in found:
            place = found[settings.source].place("from")
            raise table.error(f"{settings.source} is already forwarded at {place}", "from")
        found[settings.source] = table
        forwards.append(settings)
    return forwards


def _settings(table: Table) -> Settings:
    table.require_known(*_KEYS)
    locators: list[Any] = []
    for key in ("from", "to"):
        text = table.text(key)
        if text is None:
            raise table.error(f"missing {key} (expected an address)")
        locators.append(_read(table, parse_locator, text, key))
    given: dict[str, Any] = {
        "allow": _list(table, "allow", PeerRule.parse),
        "hosts": _list(table, "allow_host", HostRule.parse),
        "idle": _seconds(table, "idle"),
        "connect_timeout": _seconds(table, "connect_timeout"),
        "wait": _seconds(table, "wait"),
        "max_connections": table.integer("max_connections", 1, FORWARD_CONNECTIONS_MAX * 16),
    }
    present = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(*locators, **present)
    except ValueError as error:
        raise table.error(str(error)) from None


def _list(table: Table, key: str, parse: Callable[[str], _Value]) -> tuple[_Value, ...] | None:
    texts = table.texts(key)
    if texts is None:
        return None
    return tuple(_read(table, parse, text, key, index) for index, text in enumerate(texts))


def _read(table: Table, parse: Callable[[str], _Value], text: str, *place: str | int) -> _Value:
    try:
        return parse(text)
    except ValueError as error:
        raise table.error(str(error), *place) from None


def _seconds(table: Table, key: str) -> float | None:
    value = table.values.get(key)
    if value is None:
        return None
    if type(value) not in (int, float):
        raise table.error(f"{kind(value)} (expected seconds)", key)
    if not 0 <= value < float("inf"):
        raise table.error(f"{shown(value)} is out of range (expected seconds from 0)", key)
    return float(value)
