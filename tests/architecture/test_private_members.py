"""Tests use public names; each exception has its reason here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

#: By file: the private members of other objects that it uses, and the reason.
ALLOWED = {
    "cli/test_passed_descriptors.py": ({"_routes"}, "attack: sends rights over a route"),
    "daemon/test_disconnect.py": ({"_request"}, "requests that a public method cannot send"),
    "daemon/test_disconnect_search.py": ({"_try", "_remaining"}, "one step of a search at a time"),
    "daemon/test_loop.py": ({"_poll", "_operations", "_running"}, "played faults; a second run"),
    "daemon/test_replace.py": ({"_RESTORE_SECONDS"}, "a limit, shortened"),
    "devices/virtio/fuzz.py": ({"_vrings", "_on_ready"}, "random events, until rings are disabled"),
    "documentation/test_pages.py": ({"_protected_args"}, "click has no public name for them"),
    "eventloop/test_signals.py": ({"_poll", "_selector"}, "a signal just before the wait"),
    "guestrpc/test_packets.py": ({"_buffer"}, "memory that a decoder takes has no other sign"),
    "nfs/test_service.py": (
        {"_procedures", "_listings", "_costs", "_parts", "_connection", "_TABLE"},
        "memory that a cache takes has no other sign; played fault: a broken state file",
    ),
    "simulation/test_simulation.py": ({"_hang_up"}, "planted fault"),
    "simulation/virtio_device_world.py": ({"_used"}, "invariants of a queue's state"),
    "simulation/vmci_world.py": (
        {"_connections", "_unsent"},
        "invariants: what the device holds after each step",
    ),
    "supervisor/test_trace_interceptor.py": (
        {"_descriptors", "_may_get"},
        "played fault: pidfd_getfd is forbidden",
    ),
    "unit/test_logs.py": ({"_buckets"}, "memory that a limiter takes has no other sign"),
    "vm/machine.py": ({"_wait_for"}, "of the same class"),
    "vm/remote.py": ({"_number"}, "of the same class"),
}

#: Private by their spelling alone: os._exit, methods of named tuples, a package of vsockets.
PUBLIC = {"_exit", "_replace", "_asdict", "_fields", "_make", "_linux"}


def private_members(path: Path) -> set[str]:
    """Return the private attributes of objects other than ``self`` that a file uses."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in PUBLIC
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not isinstance(node.value, ast.Call)  # super()
        and not (isinstance(node.value, ast.Attribute) and node.value.attr == node.attr)
    }


#: The simulator runs vsockd's parts step by step, and plays their surroundings.
SIMULATOR = TESTS / "simulation"


@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        if SIMULATOR not in path.parents
    ),
)
def test_private_members_are_used_for_a_reason(name: str) -> None:
    allowed, _ = ALLOWED.get(name, (set[str](), ""))
    assert private_members(TESTS / name) <= allowed
