"""A device's process, shut in before any guest can speak to it."""

from __future__ import annotations


def enter_sandbox() -> None:
    """Give up what the device does not need."""
