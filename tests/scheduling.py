"""The order of the test files in a parallel run, and those that one worker runs together."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

#: Files, by group, that share what takes seconds to start: virtual machines that are booted once
#: for all of them, and a cluster of RabbitMQ.
_GROUPS = {
    "machines with a VMCI device": (
        *("vm/test_vmci.py", "vm/test_vmci_streams.py", "vm/test_machine_life_cycle.py"),
        *("vm/test_kernel_transport.py", "vm/test_answers.py", "vm/test_guide.py"),
        *("vm/test_minimal.py", "vm/test_nfs.py"),
    ),
    "machines with a virtio device": (
        *("vm/test_virtio.py", "vm/test_unread.py", "vm/test_tracing.py", "vm/test_library.py"),
    ),
    "RabbitMQ": ("amqp/test_rabbitmq.py", "amqp/test_survival.py", "vm/test_amqp.py"),
}

#: The group of each file that has one.
GROUP_OF = {f"tests/{path}": group for group, paths in _GROUPS.items() for path in paths}


def order(item: pytest.Item) -> tuple[bool, str, int]:
    """Return a key that sorts tests: the groups, which take longest, then the files, mixed.

    Tests of machines wait while those of other folders compute.
    """
    path = item.location[0]
    return path not in GROUP_OF, GROUP_OF.get(path, ""), zlib.crc32(path.encode())


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return pytest-xdist's scheduler of files, which gives a group to one worker."""
    from xdist.scheduler import LoadFileScheduling  # here: tests run without pytest-xdist, too

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return GROUP_OF.get(path, path)

    return Scheduling(config, log)
