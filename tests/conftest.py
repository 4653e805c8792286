"""What holds for all tests: no kernel AF_VSOCK, and no fabric but the tests' own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

import no_kernel_vsock
from vsockets.control import Control

no_kernel_vsock.install()

_scratch = Path(tempfile.mkdtemp(prefix="vsock-", dir="/tmp"))
os.environ["VSOCKETS_TRANSPORT"] = "fabric"
os.environ["VSOCKETS_DIR"] = str(_scratch / "fabric")
os.environ.pop("VSOCKETS_CONTEXT", None)
os.environ.pop("COLUMNS", None)  # tests' programs print whole lines wherever the tests run

# A busy machine makes no test fail.
hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
if "CI" not in os.environ:  # there Hypothesis has a profile of its own, which repeats itself
    hypothesis.settings.load_profile("any-speed")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop a vsockd that was started on demand, and remove what it had."""
    try:
        with Control(_scratch / "fabric") as control:
            control.stop()
    except OSError:
        pass  # there was none
    shutil.rmtree(_scratch, ignore_errors=True)
