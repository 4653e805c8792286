"""C programs: static linking, signals, threads, invalid pointers."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import vsockets
from cli.vsock import Vsock
from vsockets.testing import PrivateFabric, wait_until

from .conftest import Compile

RAW = ("-static", "-nostdlib", "-O1", "-fno-stack-protector", "-fcf-protection=none")


def test_a_static_program_with_raw_system_calls_works(
    vsock: Vsock, fabric: PrivateFabric, compile_c: Compile
) -> None:
    options = RAW if platform.machine() == "x86_64" else RAW[:-1]
    program = compile_c("raw.c", *options)
    assert b"INTERP" not in subprocess.run(["readelf", "-l", program], capture_output=True).stdout
    with vsockets.create_server((2, 7000), context=fabric.host) as server:
        running = vsock.start("run", "--cid", "70", program)
        server.settimeout(20)
        connection, (cid, _) = server.accept()
        with connection:
            assert cid == 70
            assert connection.recv(10) == b"raw"
            connection.sendall(b"well done\n")
        assert running.finish()[0] == b"well done\n"


def test_signals_interrupt_and_restart_accept(vsock: Vsock, compile_c: Compile) -> None:
    program = compile_c("signals.c", "-pthread")
    assert vsock("run", program, "accept").stdout.splitlines() == [
        "without SA_RESTART: -1 Interrupted system call",
        "with SA_RESTART: accepted after three signals",
    ]


def test_no_call_takes_effect_twice_during_many_signals(vsock: Vsock, compile_c: Compile) -> None:
    assert vsock("run", compile_c("signals.c", "-pthread"), "storm").stdout == "stormy\n"


def test_an_interrupted_call_that_is_repeated_takes_effect_once(
    vsock: Vsock, compile_c: Compile, interceptor: str
) -> None:
    done = vsock("run", compile_c("signals.c", "-pthread"), "again")
    calls, effect = done.stdout.split(", ")
    assert effect == "0 descriptors left\n"
    # Tracing defers signals in calls that do not wait on Linux, by a second at most.
    assert calls == "interrupted" or (calls == "calm" and interceptor == "trace")


def test_accept_times_out(vsock: Vsock, compile_c: Compile) -> None:
    program = compile_c("signals.c", "-pthread")
    done = vsock("run", program, "timeout")
    assert done.stdout == "-1 Resource temporarily unavailable\n"


def test_a_process_killed_in_accept_releases_its_port(
    vsock: Vsock, fabric: PrivateFabric, compile_c: Compile
) -> None:
    program = compile_c("signals.c", "-pthread")
    # The shell keeps the supervisor running.
    running = vsock.start("run", "--cid", "71", "sh", "-c", f"{program} killed; read line")
    port = int(running.read_line())
    running.write(b"\n")

    def is_free() -> bool:
        guest = next(c for c in fabric.control.contexts() if c["cid"] == 71)
        with vsockets.socket(context=vsockets.attach(guest["folder"])) as sock:
            try:
                sock.bind((71, port))
            except OSError:
                return False
            return True

    wait_until(is_free, "the port to be free")


def test_invalid_pointers_fail_with_efault(vsock: Vsock, compile_c: Compile) -> None:
    program = compile_c("pointers.c")
    invalid, bad = "Invalid argument", "Bad address"
    assert vsock("run", "--cid", "host", program).stdout.splitlines() == [
        *(bad, bad, invalid, invalid, invalid, invalid, "Success"),
        *(bad, bad, invalid),
        *(invalid, bad, "Protocol not available", invalid),
        *("Success", invalid, "Success", "Operation now in progress", bad),
        *("Transport endpoint is not connected", invalid),
        *("Socket type not supported", "Protocol not supported", "Operation not supported"),
        *("Inappropriate ioctl for device", "Bad file descriptor", "Bad file descriptor"),
        *("Success", "16 40 ffffffff"),
    ]


@pytest.mark.parametrize("kind", ["stream", "datagram"])
def test_the_guides_listings_work(vsock: Vsock, compile_c: Compile, kind: str) -> None:
    from pathlib import Path

    folder = Path(__file__).parents[2] / "examples" / "c"
    server = compile_c(folder / f"{kind}_server.c", "-Wextra")
    client = compile_c(folder / f"{kind}_client.c", "-Wextra")
    serving = vsock.start("run", "--cid", "host", server, "0")
    port = serving.read_line().rpartition(" ")[2]
    said = vsock("run", "--cid", "72", client, "2", port).stdout
    heard = serving.finish()[0].decode()
    if kind == "stream":
        assert said == "HELLO FROM CONTEXT 72\n"
        assert heard == "serving context 72\n"
    else:
        assert said == "context 2 says: you are context 72\nand again: you are context 72\n"
        assert heard == "sendto from context 72\nsend from context 72\n"


def test_the_header_compiles_for_windows(compile_c: Compile) -> None:
    compile_c("windows.c", "-lws2_32", compiler="x86_64-w64-mingw32-gcc")


def test_the_header_compiles_as_cplusplus_and_with_linuxs_own(compile_c: Compile) -> None:
    compile_c("header.c", "-std=gnu89", "-pedantic")
    compile_c("header.c", "-Wextra", compiler="g++")


def test_the_headers_path_is_printed(vsock: Vsock) -> None:
    folder = vsock("include-dir").stdout.strip()
    assert subprocess.run(["test", "-r", f"{folder}/vmci_sockets.h"], check=False).returncode == 0


#: Prints the sender that recvfrom() returns, at both ends of a stream.
SENDERS = """
import ctypes, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def sender(sock):
    address, size = ctypes.create_string_buffer(200), ctypes.c_int(200)
    data = ctypes.create_string_buffer(10)
    assert libc.recvfrom(sock.fileno(), data, 10, 0, address, ctypes.byref(size)) == 1
    return address.raw[2 : size.value].rstrip(b"\\0").decode()
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    with socket.socket(40, kind) as server, socket.socket(40, kind) as client:
        server.bind((0xFFFFFFFF, 0xFFFFFFFF))
        server.listen()
        client.connect((1, server.getsockname()[1]))
        accepted, _ = server.accept()
        with accepted:
            accepted.send(b"x")
            client.send(b"x")
            print(repr(sender(client)), repr(sender(accepted)))
"""


def test_recvfrom_on_a_stream_shows_no_path_of_vsockd(vsock: Vsock) -> None:
    done = vsock("run", sys.executable, "-c", SENDERS)
    assert done.stdout.splitlines() == ["'stream' ''", "'seqpacket' ''"]
