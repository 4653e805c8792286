"""Seccomp profiles for container runtimes that allow ``vsock run`` to supervise programs.

``seccomp_profiles/*.toml`` describes the runtimes' default profiles.  None of the profiles made
here allows ``socket(AF_VSOCK)``: the container does not get the machine's own.
"""

from __future__ import annotations

import errno
import platform
import tomllib
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name("seccomp_profiles")

#: The system calls by which a supervisor, and vsockd, look into programs.  The default profiles
#: allow those that stricter ones often forbid, and Docker's and Kubernetes' not the last.
NEEDED = ("process_vm_readv", "process_vm_writev", "ptrace", "pidfd_getfd")

#: The capabilities with an effect on system calls that all containers have by default.
_DEFAULT_CAPABILITIES = ("CAP_SYS_CHROOT",)

_ALLOW, _ERRNO, _EQUAL = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_CMP_EQ"
#: Architectures, each with those of its 32-bit programs.
_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
    "aarch64": ("SCMP_ARCH_AARCH64", ["SCMP_ARCH_ARM"]),
}


class Runtime(StrEnum):
    """Container runtimes whose default profile is known."""

    DOCKER = "docker"
    PODMAN = "podman"
    KUBERNETES = "kubernetes"


def load_facts(runtime: Runtime) -> dict[str, Any]:
    """Return a runtime's default profile: the parsed ``seccomp_profiles/RUNTIME.toml``."""
    return tomllib.loads((_FOLDER / f"{runtime}.toml").read_text())


def make_profile(runtime: Runtime, needed: Iterable[str] = NEEDED) -> dict[str, Any]:
    """Return a runtime's default profile with ``needed`` calls allowed, in the runtime's format.

    Kubernetes reads the format of the OCI, which knows no conditions: that profile is for
    containers without further capabilities, and for this machine's processor.
    """
    facts = load_facts(runtime)
    knows_conditions = runtime is not Runtime.KUBERNETES
    allowed = sorted({*facts["allow"].split(), *needed})
    rules: list[dict[str, Any]] = [_rule(allowed)]
    rules += _rules_of_families(facts)
    rules += [_rule(["personality"], _argument(0, value, _EQUAL)) for value in facts["personality"]]
    flags = facts.get("clone_forbidden_flags")
    if flags and "clone" not in allowed:
        rules.append(_rule(["clone"], _argument(0, flags, "SCMP_CMP_MASKED_EQ")))
    conditional = {name: calls.split() for name, calls in facts["capability"].items()}
    if knows_conditions:
        rules += [
            {**_rule(calls), "includes": {"caps": [name]}} for name, calls in conditional.items()
        ]
    else:
        rules += [_rule(conditional[name]) for name in _DEFAULT_CAPABILITIES]
    for name, calls in facts["errno"].items():
        for call in calls.split():
            rule = {**_rule([call]), "action": _ERRNO, "errnoRet": getattr(errno, name)}
            owners = [owner for owner, others in conditional.items() if call in others]
            if owners and knows_conditions:
                rule["excludes"] = {"caps": owners}
            if call not in allowed and not any(_allows(one, call) for one in rules):
                rules.append(rule)
    profile: dict[str, Any] = {
        "defaultAction": _ERRNO,
        "defaultErrnoRet": getattr(errno, facts["default"]),
    }
    if knows_conditions:
        profile["archMap"] = [
            {"architecture": one, "subArchitectures": others}
            for one, others in _ARCHITECTURES.values()
        ]
    else:
        one, others = _ARCHITECTURES[platform.machine()]
        profile["architectures"] = [one, *others]
    return {**profile, "syscalls": rules}


def _allows(rule: dict[str, Any], call: str) -> bool:
    """Return whether a rule allows ``call`` in every container."""
    return call in rule["names"] and rule["action"] == _ALLOW and "includes" not in rule


def _rules_of_families(facts: dict[str, Any]) -> list[dict[str, Any]]:
    # A family that no rule allows gets the default error.
    return [_rule(["socket"], _argument(0, family, _EQUAL)) for family in facts["families"]]


def _rule(names: list[str], *arguments: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": _ALLOW}
    return {**rule, "args": list(arguments)} if arguments else rule


def _argument(index: int, value: int, operator: str) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": 0, "op": operator}
