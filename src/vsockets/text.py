"""Text that others chose, on its way to people."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return ``text`` on one line, with every character escaped that would not be seen as itself.

    Those are control characters, what reorders or hides other characters, unpaired surrogates
    (bytes that are no text), and all space but the plain one: ``\\x1b``, ``\\n``, ``\\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
