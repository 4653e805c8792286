"""``make test-systemd``: the Debian package under systemd, in a booted Debian 13.

It takes longer than other tests (see docs/services.md), so that pytest finds it only by its name.
The tests are in the order of an installation's life, and need those before them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vsockets.testing import wait_until
from vsockets.vm.apt import Unavailable

from .debian_package import FIRST, NEXT
from .services_page import EXPOSURES
from .systemd_machine import INSIDE, SystemdMachine, running

pytestmark = pytest.mark.timeout(300)

ENVIRONMENT = "VSOCKETS_DIR=/run/vsock VSOCKETS_TRANSPORT=fabric"

CONFIGURATION = """
[[context]]
cid = 5
name = "web"

[[context]]
cid = 6
name = "db"
"""

#: The host and guest 5, two processes of the library, exchange bytes over one stream before and
#: after a command.
STREAM = """
import subprocess, sys, vsockets
client = "import vsockets;"
client += "sock = vsockets.create_connection((2, 5000), context=vsockets.attach('/run/vsock/5'))\\n"
client += "while data := sock.recv(100): sock.sendall(data.upper())"
with vsockets.create_server((2, 5000), context=vsockets.attach("/run/vsock/2")) as server:
    guest = subprocess.Popen([sys.executable, "-c", client])
    sock, (cid, _) = server.accept()
    for text in (b"before", b"after"):
        sock.sendall(text)
        print(cid, sock.recv(100).decode())
        if text == b"before":
            subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
    sock.close()
    guest.wait()
"""

SOCKET_UNIT = """\
[Socket]
ListenStream=127.0.0.1:2222
"""
SERVICE_UNIT = f"""\
[Service]
Environment={ENVIRONMENT}
ExecStart=vsock forward fd:3 vsock:5:22 --wait 30
"""

#: A guest's program under ``vsock run``, in a unit whose sandbox forbids AF_VSOCK.
GUEST_PROGRAM = """\
import socket, sys
with socket.socket(socket.AF_VSOCK) as sock:
    sock.connect((2, 5010))
    print("the host sends", word := sock.recv(100).decode())
sys.exit(word != "end")
"""
GUEST_UNIT = f"""\
[Service]
Environment={ENVIRONMENT}
ExecStart=vsock run -v --cid 5 -- python3 /run/guest.py
Restart=on-failure
RestartSec=100ms
NoNewPrivileges=yes
PrivateTmp=yes
ProtectHome=yes
ProtectSystem=strict
RestrictAddressFamilies=AF_UNIX
SystemCallFilter=@system-service @debug
SystemCallErrorNumber=EPERM
"""
#: The host's program: starts the unit, and has its first process fail.
HOST_PROGRAM = """
import subprocess, vsockets
with vsockets.create_server((2, 5010), context=vsockets.attach("/run/vsock/2")) as server:
    subprocess.run(["systemctl", "start", "guest"], check=True)
    for word in (b"fail", b"end"):
        sock, (cid, _) = server.accept()
        print(cid)
        sock.sendall(word)
        sock.close()
"""

#: The suite of a played machine: an agent in it answers before and after a snapshot's restore.
PLAYED_SUITE = """
import os, socket, subprocess
agent = "import socket; server = socket.socket(socket.AF_VSOCK); server.bind((2**32 - 1, 5000))\\n"
agent += "server.listen(); print(flush=True)\\n"
agent += "while True: server.accept()[0].send(b'agent')"
cid = os.environ["VSOCKETS_PLAYED_CID"]
command = ["vsock", "run", "--cid", cid, "--", "python3", "-c", agent]
agent = subprocess.Popen(command, stdout=subprocess.PIPE)
agent.stdout.readline()
def call():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.environ["VSOCKETS_PLAYED_SOCKET"])
        sock.sendall(b"CONNECT 5000\\n")
        with sock.makefile("rb") as lines:
            assert lines.readline().startswith(b"OK ")
            return lines.read(5).decode()
first = call()
for operation in ("snapshot", "restore"):
    subprocess.run(["vsock", "played", operation, cid], check=True, stdout=subprocess.DEVNULL)
print(os.getuid() != 0, first, call())
"""

FORWARDS = """\
[[forward]]
from = "unix:/run/vsock-forward/web"
to = "vsock:5:5001"
wait = 30
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[SystemdMachine]:
    """The machine, with the package installed."""
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/tmp") as name:
        try:
            with running(Path(name)) as machine:
                machine.run("dpkg", "--install", f"{INSIDE}/vsockets_{FIRST}_all.deb")
                write(machine, "/etc/vsock/guests.toml", CONFIGURATION)
                yield machine
        except Unavailable as error:
            pytest.skip(str(error))


def write(machine: SystemdMachine, path: str, text: str) -> None:
    machine.machine.run("open(path, 'w').write(text)", path=path, text=text)


def stream_over(machine: SystemdMachine, *command: str) -> None:
    """Check that a stream lives on while a command runs."""
    result = machine.shell(f"{ENVIRONMENT} exec python3 -c {quoted(STREAM)} {' '.join(command)}")
    assert result == "5 BEFORE\n5 AFTER\n"


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def serve_in_guest_5(machine: SystemdMachine, port: int, text: str) -> None:
    command = f"vsock listen --exec 'echo {text}' --keep {port}"
    unit = f"guest-{port}"
    machine.shell(
        f"systemd-run --quiet --unit={unit} --setenv=VSOCKETS_CONTEXT=/run/vsock/5 "
        f"--setenv=VSOCKETS_TRANSPORT=fabric {command}"
    )


def test_vsockd_starts_with_the_package(machine: SystemdMachine) -> None:
    assert machine.run("systemctl", "is-enabled", "vsockd") == "enabled\n"
    assert machine.run("systemctl", "is-active", "vsockd") == "active\n"
    assert machine.property("vsockd", "Type") == "notify"
    status = json.loads(machine.run("vsock", "status", "--json"))
    assert machine.property("vsockd", "MainPID") == str(status["holder"])


def test_a_reload_reads_the_configuration(machine: SystemdMachine) -> None:
    machine.run("systemctl", "reload", "vsockd")
    names = [row["name"] for row in json.loads(machine.run("vsock", "context", "ls", "--json"))]
    assert names == ["host", "web", "db"]


def test_a_start_waits_for_readiness(machine: SystemdMachine) -> None:
    """A start that has returned has a vsockd that serves, or has failed for good."""
    machine.shell("systemctl restart vsockd && vsock status")
    write(machine, "/etc/vsock/wrong.toml", "[[context]]\ncid = 1\n")
    assert machine.attempt("systemctl", "reload", "vsockd").status == 1
    machine.run("vsock", "status")  # with the configuration before
    assert machine.attempt("systemctl", "restart", "vsockd").status == 1
    assert machine.property("vsockd", "ActiveState") == "failed"
    assert machine.property("vsockd", "NRestarts") == "0"
    log = machine.run("journalctl", "--no-pager", "--unit=vsockd")
    assert log.count("/etc/vsock/wrong.toml:2: context.cid: 1 is out of range") == 2
    machine.shell("rm /etc/vsock/wrong.toml; systemctl start vsockd")
    machine.run("vsock", "status")


def test_streams_live_on_through_a_restart(machine: SystemdMachine) -> None:
    before = machine.property("vsockd", "MainPID")
    stream_over(machine, "systemctl", "restart", "vsockd")
    assert machine.property("vsockd", "MainPID") != before


def test_a_crash_is_followed_by_a_start(machine: SystemdMachine) -> None:
    stream_over(machine, "systemctl", "kill", "--signal=KILL", "vsockd")

    def is_restarted() -> bool:
        return machine.property("vsockd", "NRestarts") == "1" and (
            machine.property("vsockd", "ActiveState") == "active"
        )

    wait_until(is_restarted, "systemd to start vsockd", 60)
    machine.run("vsock", "status")


def test_the_journal_has_denials_with_their_priority(machine: SystemdMachine) -> None:
    connect = "VSOCKETS_CONTEXT=/run/vsock/5 VSOCKETS_TRANSPORT=fabric vsock connect 6 5000"
    machine.shell(connect, expect=1)
    lines = machine.run("journalctl", "--output=json", "--unit=vsockd").splitlines()
    denials = [line for line in map(json.loads, lines) if "denied: " in str(line["MESSAGE"])]
    assert "connect 5:any to 6:5000" in denials[-1]["MESSAGE"]
    assert denials[-1]["PRIORITY"] == "4"
    assert denials[-1]["_SYSTEMD_UNIT"] == "vsockd.service"


def test_a_guest_process_is_a_unit(machine: SystemdMachine) -> None:
    """A program that fails is started again; its output is in the journal.

    systemd's filter refuses AF_VSOCK, as a container's does.
    """
    write(machine, "/run/guest.py", GUEST_PROGRAM)
    write(machine, "/run/systemd/system/guest.service", GUEST_UNIT)
    machine.run("systemctl", "daemon-reload")
    assert machine.shell(f"{ENVIRONMENT} exec python3 -c {quoted(HOST_PROGRAM)}") == "5\n5\n"
    wait_until(
        lambda: machine.property("guest", "ActiveState") == "inactive", "the unit to end", 60
    )
    assert machine.property("guest", "Result") == "success"
    log = machine.run("journalctl", "--no-pager", "--output=cat", "--unit=guest").splitlines()
    assert [line for line in log if "sends" in line] == [
        "the host sends fail",
        "the host sends end",
    ]
    reason = "vsock run: interceptor trace: a seccomp filter refuses AF_VSOCK (EAFNOSUPPORT)"
    assert log.count(reason) == 2


def test_a_played_machine_in_a_unit(machine: SystemdMachine) -> None:
    """The unit is one of a user without rights; nothing of it is left."""
    write(machine, "/run/suite.py", PLAYED_SUITE)
    sandbox = "-p DynamicUser=yes -p PrivateTmp=yes -p ProtectHome=yes -p NoNewPrivileges=yes"
    command = "vsock fabric --as firecracker -- python3 /run/suite.py"
    unit = f"systemd-run --quiet --collect --wait --pipe --unit=played {sandbox} {command}"
    assert machine.shell(unit) == "True agent agent\n"
    assert (
        machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "played*") == ""
    )


def test_a_forward_of_a_file(machine: SystemdMachine) -> None:
    serve_in_guest_5(machine, 5001, "from guest 5")
    machine.run("mkdir", "--parents", "/etc/vsock/forward")
    write(machine, "/etc/vsock/forward/web.toml", FORWARDS)
    machine.run("systemctl", "enable", "--now", "vsock-forward@web")
    ask = """
    import socket
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("/run/vsock-forward/web")
        result = sock.recv(100)
    """
    assert machine.machine.run(ask) == b"from guest 5\n"
    machine.run("systemctl", "reload", "vsock-forward@web")
    assert machine.machine.run(ask) == b"from guest 5\n"
    replace(machine, "vsock-forward@web")
    assert machine.machine.run(ask) == b"from guest 5\n"


def replace(machine: SystemdMachine, unit: str) -> None:
    """Have another process take over a forward."""
    with another_takes_over(machine, unit):
        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=USR2", unit)


@contextmanager
def another_takes_over(machine: SystemdMachine, *units: str) -> Iterator[None]:
    """Check that in the with block each unit is replaced once, and its main process stays."""

    def replacements(unit: str) -> int:
        log = machine.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}")
        assert "not replaced" not in log
        return log.count("replaced by process")

    def are_replaced() -> bool:
        return all(replacements(unit) == count + 1 for unit, count in before.items())

    before = {unit: replacements(unit) for unit in units}
    main = {unit: machine.property(unit, "MainPID") for unit in units}
    yield
    wait_until(are_replaced, "other processes to take over", 60)
    assert main == {unit: machine.property(unit, "MainPID") for unit in units}


def test_a_forward_by_socket_activation(machine: SystemdMachine) -> None:
    """The units are those of docs/forward.md."""
    serve_in_guest_5(machine, 22, "activated")
    write(machine, "/run/systemd/system/guest-ssh.socket", SOCKET_UNIT)
    write(machine, "/run/systemd/system/guest-ssh.service", SERVICE_UNIT)
    machine.shell("systemctl daemon-reload && systemctl start guest-ssh.socket")
    assert machine.property("guest-ssh.service", "ActiveState") == "inactive"
    ask = """
    import socket
    with socket.create_connection(("127.0.0.1", 2222)) as sock:
        result = sock.recv(100)
    """
    assert machine.machine.run(ask) == b"activated\n"
    assert machine.property("guest-ssh.service", "ActiveState") == "active"
    replace(machine, "guest-ssh.service")
    assert machine.machine.run(ask) == b"activated\n"
    machine.run("systemctl", "stop", "guest-ssh.socket", "guest-ssh.service")
    assert machine.property("guest-ssh.service", "Result") == "success"


@pytest.mark.parametrize("kind", ["virtio", "vmci"])
def test_a_device_of_a_machine(machine: SystemdMachine, kind: str) -> None:
    unit, path = f"vsock-device-{kind}@5", f"/run/vsock-device-{kind}/5"
    machine.run("systemctl", "start", unit)
    assert machine.run("stat", "--format=%F %a", path) == "socket 600\n"
    machine.run("systemctl", "stop", unit)
    assert machine.property(unit, "Result") == "success"
    machine.run("test", "!", "-e", path)


REGISTER = """
import os, subprocess, sys
from vsockets.vm.machined import RegistrationFailed, machine_name, registered
name = machine_name("A web server", 5)
with registered(name, 5, os.getpid()):
    subprocess.run(["machinectl", "list"], check=True)
    try:
        with registered(name, 6, os.getpid()):
            pass
    except RegistrationFailed as error:
        print(error, flush=True)
subprocess.run(["machinectl", "list"], check=True)
"""


def test_a_machine_is_registered(machine: SystemdMachine) -> None:
    """machinectl lists it while the command runs that has registered it."""
    said = machine.shell(f"systemd-run --quiet --pipe --wait python3 -c {quoted(REGISTER)}")
    assert said.split()[:4] == ["MACHINE", "CLASS", "SERVICE", "OS"]
    assert "A-web-server vm    vsock" in said
    assert "systemd-machined: Register: io.systemd.Machine.MachineExists" in said
    assert said.rstrip().endswith("No machines.")


def test_the_service_of_vmware_tools(machine: SystemdMachine) -> None:
    """A guest is served; variables outlive a replacement and a restart."""
    unit = "vsock-guestinfo"
    assert machine.run("systemctl", "is-enabled", unit, expect=None) == "disabled\n"
    machine.run("systemctl", "enable", "--now", unit)
    machine.shell("vsock guestinfo enable 5 && vsock guestinfo set 5 userdata secret")
    replace(machine, unit)
    machine.run("systemctl", "restart", unit)
    assert machine.run("vsock", "guestinfo", "get", "5", "userdata") == "secret\n"
    assert machine.run("stat", "--format=%a", "/var/lib/vsock-guestinfo/variables") == "600\n"


@pytest.mark.parametrize("unit", EXPOSURES)
def test_exposure_is_that_of_the_page(machine: SystemdMachine, unit: str) -> None:
    name = unit.replace("@", "@5")
    said = machine.run("systemd-analyze", "security", "--no-pager", name)
    level = said.rpartition("exposure level for ")[2].split()[1]
    assert float(level) <= EXPOSURES[unit], said


def test_nothing_is_lost_by_a_reload_and_a_replacement(machine: SystemdMachine) -> None:
    """The commands that docs/services.md names: neither is a restart."""
    serve_in_guest_5(machine, 5009, "from before")
    machine.shell("until vsock ls | grep -q 5009; do sleep 0.1; done")
    main, before = machine.property("vsockd", "MainPID"), serving(machine)
    stream_over(machine, "systemctl", "reload-or-restart", "vsockd")
    assert serving(machine) == before
    stream_over(machine, "vsock", "--dir", "/run/vsock", "up", "--replace")
    assert serving(machine) != before
    assert machine.property("vsockd", "MainPID") == main
    assert machine.shell(f"{ENVIRONMENT} vsock connect 5 5009") == "from before\n"


def test_a_killed_vsockd_loses_nothing(machine: SystemdMachine) -> None:
    """The holder, the main process, starts vsockd again."""
    main, before = machine.property("vsockd", "MainPID"), serving(machine)
    restarts = machine.property("vsockd", "NRestarts")
    stream_over(machine, "python3", "-c", quoted(f"import os; os.kill({before}, 9)"))
    assert serving(machine) != before
    assert machine.property("vsockd", "MainPID") == main
    assert machine.property("vsockd", "NRestarts") == restarts
    assert machine.shell(f"{ENVIRONMENT} vsock connect 5 5009") == "from before\n"


def test_an_upgrade_replaces_it_and_nothing_is_lost(machine: SystemdMachine) -> None:
    """The services, too, also those of an administrator's units; other programs get no signal."""
    export = "vsock --dir /run/vsock nfs serve --export /srv --state /run/nfs.state"
    machine.shell(f"systemd-run --quiet --unit=files --property=Type=notify {export}")
    main, before = machine.property("vsockd", "MainPID"), serving(machine)
    with another_takes_over(machine, "vsock-forward@web", "vsock-guestinfo", "files"):
        stream_over(machine, "dpkg", "--install", f"{INSIDE}/vsockets_{NEXT}_all.deb")
    assert machine.property("vsockd", "MainPID") == main
    assert serving(machine) != before
    assert machine.shell(f"{ENVIRONMENT} vsock connect 5 5009") == "from before\n"
    machine.run("systemctl", "stop", "files")
    names = [row["name"] for row in json.loads(machine.run("vsock", "context", "ls", "--json"))]
    assert names == ["host", "web", "db"]


def serving(machine: SystemdMachine) -> int:
    """Return the process id of the vsockd that serves."""
    pid: int = json.loads(machine.run("vsock", "status", "--json"))["pid"]
    return pid


def test_a_stop_is_clean_and_no_program_starts_it(machine: SystemdMachine) -> None:
    machine.run("systemctl", "stop", "vsock-guestinfo", "vsockd")
    assert machine.property("vsockd", "Result") == "success"
    assert machine.property("vsockd", "ExecMainStatus") == "0"
    assert machine.run("ls", "-A", "/run/vsock").split() == ["vsockd.start"]
    done = machine.attempt("vsock", "run", "true")
    assert done.status == 1
    assert "vsockd was started as a service" in done.errors
    assert "or remove /run/vsock/vsockd.start to allow" in done.errors
    machine.run("systemctl", "start", "vsockd")


def test_a_purge_leaves_nothing(machine: SystemdMachine) -> None:
    """Not even the services that still run and are enabled."""
    machine.run("systemctl", "start", "vsock-forward@web", "vsock-guestinfo")
    machine.shell("rm -r /etc/vsock/forward /etc/vsock/guests.toml")
    machine.run("dpkg", "--purge", "vsockets")
    assert machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "vsock*") == ""
    left = "ls -d /run/vsock* /etc/vsock* /var/lib/vsock* 2>/dev/null"
    assert machine.shell(left, expect=None) == ""
    assert machine.shell("ls /etc/systemd/system/*.wants/vsock*", expect=None) == ""
    running = "for pid in /proc/[0-9]*; do readlink $pid/exe; tr '\\0' ' ' <$pid/cmdline; done"
    assert "/usr/bin/vsock" not in machine.shell(f"{running} 2>/dev/null", expect=None)
