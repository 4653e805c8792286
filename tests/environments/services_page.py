"""The table of docs/services.md with each unit's exposure, as ``systemd-analyze security`` says."""

from __future__ import annotations

import re
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs/services.md"

#: By unit, from 0 (none) to 10: the highest that tests allow.
EXPOSURES = {
    unit: float(level)
    for unit, level in re.findall(
        r"^\| `(vsock\S+\.service)` \| ([\d.]+) \|", _PAGE.read_text(), re.M
    )
}
