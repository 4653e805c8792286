"""``vsock doctor`` in containers: what works there, and which option of the runtime to add."""

from __future__ import annotations

import json

import pytest

from .test_run import ORDINARY_USER, contained

#: (profile, user, findings).
TABLES = [
    ("docker", (), {"pidfd_getfd": "partly", "user namespaces": "no"}),
    ("kubernetes", ORDINARY_USER, {"pidfd_getfd": "partly", "user namespaces": "no"}),
    ("podman", (), {"pidfd_getfd": "yes", "user namespaces": "yes"}),
]

#: What no container has by default, and the option that adds it.
OPTIONS = {
    "KVM": "--device /dev/kvm;",
    "/dev/vhost-vsock": "--device /dev/vhost-vsock;",
    "FUSE": "--device /dev/fuse --cap-add SYS_ADMIN;",
}


@pytest.mark.parametrize(
    ("profile", "user", "findings"), TABLES, ids=[profile for profile, *_ in TABLES]
)
def test_findings(profile: str, user: tuple[str, ...], findings: dict[str, str]) -> None:
    lines, errors = contained(profile, user, "$vsock doctor --json")
    assert errors == []
    table = {finding["what"]: finding for finding in json.loads("\n".join(lines))}
    findings |= {"fabric (vsockd)": "yes", "ptrace": "yes", "seccomp notification": "partly"}
    assert {what: table[what]["state"] for what in findings} == findings
    for what, option in OPTIONS.items():
        assert table[what]["state"] == "no"
        assert table[what]["install"].startswith(f"container option {option} on its host: ")
    if table["kernel AF_VSOCK"]["detail"].startswith("vmw_vsock"):  # the machine has it
        assert table["kernel AF_VSOCK"]["state"] == "no"
