"""A short run of the fuzzer; docs/virtio.md has the results of a long run."""

from __future__ import annotations

import gc
import logging
import os

import pytest

from .fuzz import fuzz


def test_random_driver_raises_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    fuzz(1, 2000)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    fuzz(2, 6000)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert not caplog.records
