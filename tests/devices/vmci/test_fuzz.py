"""A short run of the fuzzer: no exception, no leaked descriptor, no growth."""

from __future__ import annotations

import gc
import logging
import os

import pytest

from .fuzz import Fuzzer


@pytest.mark.parametrize("seed", range(4))
def test_random_moves_of_a_guest_leave_no_trace(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with caplog.at_level(logging.ERROR):
        fuzzer = Fuzzer(seed)
        fuzzer.run(8192)
        fuzzer.restart()
        fuzzer.guest.device.interrupts.close()
        fuzzer.guest.close()
    assert not caplog.records
    hypervisor = fuzzer.guest.machine.hypervisor
    sockets = fuzzer.guest.machine.sockets
    assert hypervisor.is_idle and sockets.is_idle
    fuzzer.guest.loop.close()
    del fuzzer, hypervisor, sockets
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
