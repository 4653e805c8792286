"""The user's home folder."""

from __future__ import annotations

from pathlib import Path


def home_folder() -> Path:
    """Return this user's home folder; a path that does not exist if the user has none.

    A dynamic user of systemd has none, nor has a user without a name in a container.
    """
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")
