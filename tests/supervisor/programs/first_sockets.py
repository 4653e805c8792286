"""Let many threads of many processes make their first vSockets sockets at the same time.

Another thread of each process sleeps meanwhile, and one starts programs.  Prints how many threads
have failed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

THREADS = 3


def exchange() -> None:
    """Connect two sockets, and send a byte."""
    with socket.socket(40) as listener, socket.socket(40) as client:
        listener.bind((1, 0xFFFFFFFF))
        listener.listen()
        client.connect((1, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"x")
            assert client.recv(1) == b"x"
            assert 0 not in (listener.fileno(), client.fileno(), accepted.fileno())


def main(count: int) -> None:
    """Start ``count`` processes, and print how many of their threads have failed."""
    (start, started), (results, result) = os.pipe(), os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            threads = [threading.Thread(target=run, args=(start, result)) for _ in range(THREADS)]
            threads.append(threading.Thread(target=time.sleep, args=(0.3,)))
            threads.append(threading.Thread(target=start_programs))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(0)
    os.write(started, b"s" * count * THREADS)
    found = b""
    while len(found) < count * THREADS:
        found += os.read(results, 100)
    for _ in range(count):
        os.wait()
    print(f"{found.count(b'-')} of {len(found)} failed")


def run(start: int, result: int) -> None:
    """Wait for the start; report success or failure."""
    os.read(start, 1)
    try:
        exchange()
    except Exception as error:
        print(repr(error), flush=True)
        os.write(result, b"-")
    else:
        os.write(result, b"+")


def start_programs() -> None:
    """Start programs, by vfork()."""
    for _ in range(5):
        subprocess.run(["true"], check=True)


main(int(sys.argv[1]))
