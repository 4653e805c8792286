"""Text that others chose, on its way to people."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Return ``text`` on one line, with every character escaped that would not be seen as itself.

    Those are control characters, what reorders or hides other characters, unpaired surrogates
    (bytes that are no text), and all space but the plain one: ``\\x1b``, ``\\n``, ``\\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def word(text: str) -> str:
    """Return ``text`` as part of a sentence: in quotes, as Python writes it, unless it is one word.
    So a path cannot go on as the sentence does.
    """
    plain = text.isprintable() and not any(one in text for one in " '\"\\")
    return text if plain else repr(text)


def all_printable(value: Any) -> Any:
    """Return ``value``, fit for JSON, with every text in it as :func:`printable` returns it."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: all_printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(one) for one in value]
    return value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
