"""Dependencies point one way (DESIGN.md, chapter 6), and modules stay readable."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets

ROOT = Path(vsockets.__file__).parent
MODULES = {
    ".".join(("vsockets", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}

#: What the decisions and the codec may know: plain values, nothing that does anything.
PLAIN = ("vsockets.model", "vsockets.limits")

#: How virtual machines are described; the rest of ``vsockets.vm`` starts them.
DESCRIPTIONS = [
    "vsockets.vmware",
    *(f"vsockets.vm.{name}" for name in ("hardware", "qemu_args", "life_cycle")),
]

#: Programs between vSockets and the rest of the world.
PROGRAMS = tuple(f"vsockets.{name}" for name in ("amqp", "capture", "forward", "nfs", "perf"))


def imports(module: str) -> Iterator[str]:
    """Every module that ``module`` imports anywhere in it, by its full name.

    ``from a import b`` gives both ``a`` and ``a.b``: only the file system knows which it is.
    """
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = package.split(".")
                base = parts[: len(parts) - node.level + 1]
                origin = ".".join([*base, *filter(None, [node.module])])
            yield origin
            yield from (f"{origin}.{name.name}" for name in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ours(module: str) -> set[str]:
    """The modules of vsockets that ``module`` imports."""
    names = {name for name in imports(module) if name in MODULES}
    # The package itself comes with whatever of it is imported; `from .. import x` names x too.
    return names - {"vsockets"}


@pytest.mark.parametrize("package", ["vsockets.fabric", "vsockets.protocol"])
def test_decisions_and_codec_know_only_plain_values(package: str) -> None:
    for module in filter(lambda name: within(name, package), MODULES):
        strange = {name for name in ours(module) if not within(name, package, *PLAIN)}
        assert not strange, f"{module} imports {strange}"


def test_plain_values_know_only_each_other() -> None:
    for module in filter(lambda name: within(name, *PLAIN), MODULES):
        assert all(within(name, *PLAIN) for name in ours(module)), module


@pytest.mark.parametrize("package", ["vsockets.supervisor"])
def test_modules_of_a_package_import_each_other_one_way(package: str) -> None:
    """Imports for type checking count too: they show that two modules are one."""
    modules = [name for name in MODULES if within(name, package)]
    graph = {
        # `from . import x` names the package too, which is above the module itself.
        module: {name for name in ours(module) if within(name, package)}
        - {name for name in modules if within(module, name)}
        for module in modules
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_handlers_of_system_calls_do_not_know_what_intercepts_them() -> None:
    mechanisms = [f"vsockets.supervisor.{name}" for name in ("notification", "tracing", "ptrace")]
    mechanisms += ["vsockets.supervisor.supervisor", "vsockets.supervisor.launch"]
    handlers = ("vsockets.supervisor.calls", "vsockets.supervisor.call")
    for module in filter(lambda name: within(name, *handlers), MODULES):
        strange = {name for name in ours(module) if within(name, *mechanisms)}
        assert not strange, f"{module} imports {strange}"


@pytest.mark.parametrize("package", ["vsockets.fabric", "vsockets.protocol"])
def test_decisions_and_codec_do_no_io(package: str) -> None:
    doers = {"socket", "_socket", "select", "selectors", "asyncio", "threading", "subprocess"}
    doers |= {"time", "pathlib", "signal"}
    for module in filter(lambda name: within(name, package), MODULES):
        assert not doers & set(imports(module)), module


@pytest.mark.parametrize("module", DESCRIPTIONS)
def test_virtual_machines_are_described_in_plain_values(module: str) -> None:
    # `from . import x` names the package too, which holds descriptions only.
    plain = (*DESCRIPTIONS, *PLAIN)
    assert all(within(name, *plain) for name in ours(module) - {"vsockets.vm"})
    doers = {"socket", "select", "asyncio", "threading", "subprocess", "time", "signal"}
    assert not doers & set(imports(module))


def test_virtual_machines_are_started_without_the_command_line() -> None:
    for module in filter(lambda name: within(name, "vsockets.vm"), MODULES):
        forbidden = ("vsockets.cli", "vsockets.daemon", "vsockets.devices")
        assert not {name for name in ours(module) if within(name, *forbidden)}, module


def test_only_tools_start_virtual_machines() -> None:
    for module in filter(lambda name: not within(name, "vsockets.vm", "vsockets.cli"), MODULES):
        assert not {name for name in ours(module) if within(name, "vsockets.vm")}, module


def test_configuration_is_plain_values() -> None:
    configuration = {"vsockets.daemon.configuration", "vsockets.toml"}
    known = (*PLAIN, "vsockets.fabric", "vsockets.vmware", "vsockets.toml", *configuration)
    for module in configuration:
        # `from . import x` names the package too, which holds nothing.
        strange = {name for name in ours(module) - {"vsockets.daemon"} if not within(name, *known)}
        assert not strange, f"{module} imports {strange}"


#: Packages without import cycles, not even cycles for type checking only.
ACYCLIC = tuple(f"vsockets.{name}" for name in ("daemon", "eventloop", "fabric", "model", "toml"))


def test_no_import_cycle_even_for_type_checking() -> None:
    members = [name for name in MODULES if within(name, *ACYCLIC)]
    edges = {
        # `from . import x` and `from .. import x` name the package too.
        name: {other for other in ours(name) if not within(name, other)} & set(members)
        for name in members
    }
    while free := {name for name, others in edges.items() if not others}:
        edges = {name: others - free for name, others in edges.items() if name not in free}
    assert not edges, f"cycles among {sorted(edges)}"


def test_vsockd_does_not_name_devices() -> None:
    for module in filter(lambda name: within(name, "vsockets.daemon"), MODULES):
        if module != "vsockets.daemon.__main__":  # which puts the programs together
            assert "vsockets.devices" not in MODULES[module].read_text(), module


def test_vsockd_is_not_its_own_client() -> None:
    forbidden = ("vsockets.socket", "vsockets.transports", "vsockets.cli", "vsockets.api")
    for module in filter(lambda name: within(name, "vsockets.daemon"), MODULES):
        strange = {name for name in ours(module) if within(name, *forbidden)}
        assert not strange, f"{module} imports {strange}"


def test_programs_know_neither_vsockd_nor_the_command_line() -> None:
    for module in filter(lambda name: within(name, *PROGRAMS), MODULES):
        names = ours(module)
        strange = {name for name in names if within(name, "vsockets.cli", "vsockets.daemon")}
        assert not strange, f"{module} imports {strange}"


@pytest.mark.parametrize("name", ["fairness", "http_connect", "proxies", "settings"])
def test_the_forwarders_decisions_do_no_io(name: str) -> None:
    doers = {"socket", "select", "selectors", "asyncio", "threading", "subprocess", "os", "time"}
    assert not doers & set(imports(f"vsockets.forward.{name}"))


@pytest.mark.parametrize("name", ["frames", "handshake_inspector", "routing"])
def test_the_amqp_proxies_decisions_do_no_io(name: str) -> None:
    doers = {"socket", "select", "selectors", "asyncio", "threading", "subprocess", "os", "time"}
    assert not (doers | {"h2"}) & set(imports(f"vsockets.amqp.{name}"))


def test_a_guests_proxy_needs_no_ctypes() -> None:
    """Debian's python3-minimal, which a guest may have alone, lacks it."""
    source = (
        "import sys; sys.modules['ctypes'] = sys.modules['_ctypes'] = None\n"
        "import vsockets.amqp.__main__, vsockets.amqp.guest_proxy"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


@pytest.mark.parametrize("name", ["xdr", "rpc", "mount_protocol", "retransmission"])
def test_the_decisions_of_network_storage_do_no_io(name: str) -> None:
    doers = {"socket", "select", "selectors", "asyncio", "threading", "subprocess", "os", "time"}
    assert not doers & set(imports(f"vsockets.nfs.{name}"))


@pytest.mark.parametrize("protocol", ["vfio_user", "vhost_user"])
def test_protocols_of_devices_know_nothing_of_what_they_carry(protocol: str) -> None:
    package = f"vsockets.devices.{protocol}"
    known = (
        *PLAIN,
        package,
        "vsockets.devices.limits",
        "vsockets.devices.unix_server",
        "vsockets.devices.guest_memory",
        "vsockets.devices.loop",
        "vsockets.eventloop.loop",
        "vsockets.devices",
    )
    for module in filter(lambda name: within(name, package), MODULES):
        strange = {name for name in ours(module) if name not in known and not within(name, package)}
        assert not strange, f"{module} imports {strange}"


def test_devices_do_not_import_vsockd() -> None:
    for module in filter(lambda name: within(name, "vsockets.devices"), MODULES):
        assert not {name for name in ours(module) if within(name, "vsockets.daemon")}, module


def test_only_tools_use_a_command_line_library() -> None:
    for module in filter(lambda name: not within(name, "vsockets.cli"), MODULES):
        strange = {name for name in imports(module) if within(name, "click", "rich")}
        assert not strange, f"{module} imports {strange}"


def test_only_the_plugin_needs_pytest() -> None:
    for module in filter(lambda name: name != "vsockets.testing.plugin", MODULES):
        assert "pytest" not in set(imports(module)), module


@pytest.mark.parametrize("module", ["vsockets", "vsockets.amqp.guest_proxy"])
def test_what_guests_need_is_the_standard_library_only(module: str) -> None:
    script = f"import sys; before = set(sys.modules); import {module}; "
    script += "print(*(set(sys.modules) - before))"
    child = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(child.stdout.split())
    own = {name for name in loaded if within(name, "vsockets")}
    foreign = {name.partition(".")[0] for name in loaded - own} - sys.stdlib_module_names
    assert not foreign
    others = {"vsockets.daemon", "vsockets.cli", "vsockets.testing"}
    others |= {"vsockets.fabric"} if module == "vsockets" else set()
    assert not {name for name in own if within(name, *others)}


@pytest.mark.parametrize("module", MODULES)
def test_module_is_explained_and_short(module: str) -> None:
    text = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(text)), "a module says in its docstring what it is"
    assert len(text.splitlines()) <= 800
