"""Escaping of untrusted text for terminals, logs and JSON."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Return ``text`` on one line, with all non-printable characters escaped.

    Escaped are control characters, characters that reorder or hide others, unpaired
    surrogates (from undecodable bytes), and all space except ``" "``: ``\\x1b``, ``\\n``,
    ``\\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def word(text: str) -> str:
    """Return ``text`` for use in a sentence: quoted as a Python string unless it is one word.

    The quotes keep a path from looking like a part of the sentence.
    """
    plain = text.isprintable() and not any(one in text for one in " '\"\\")
    return text if plain else repr(text)


def all_printable(value: Any) -> Any:
    """Return ``value`` for JSON, with every string in it escaped by :func:`printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: all_printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(one) for one in value]
    return value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
