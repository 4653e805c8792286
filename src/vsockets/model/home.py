"""The user's home folder."""

from __future__ import annotations

from pathlib import Path


def home_folder() -> Path:
    """Return this user's home folder; a path that does not exist if the user has none.

    That is so for a dynamic user of systemd, and for a user of a container who has no name.
    """
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")
