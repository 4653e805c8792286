"""An unmodified Python program that tries the features of the standard library's sockets.

Run in a guest; the same context is its own peer (VMADDR_CID_LOCAL).  Prints "all well".
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import threading

VSOCK = socket.AF_VSOCK
ANY, LOCAL = socket.VMADDR_CID_ANY, 1


def fails(code, call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno == code, (call, arguments, error)
    else:
        raise AssertionError(f"{call} {arguments} did not fail")


def listener(kind=socket.SOCK_STREAM, backlog=5):
    server = socket.socket(VSOCK, kind)
    server.bind((LOCAL, ANY))
    server.listen(backlog)
    return server


def pair(kind=socket.SOCK_STREAM):
    with listener(kind) as server:
        client = socket.socket(VSOCK, kind)
        client.connect(server.getsockname())
        accepted, address = server.accept()
        assert address == client.getsockname() == accepted.getpeername()
        assert client.getpeername() == accepted.getsockname()
        return client, accepted


def flags():
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with socket.socket(VSOCK, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
            assert not os.get_blocking(sock.fileno()) and not os.get_inheritable(sock.fileno())
        with socket.socket(VSOCK, kind) as sock:
            assert os.get_blocking(sock.fileno())
            assert sock.getsockname() == (ANY, ANY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == VSOCK
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == kind
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == 0
            fails(errno.ENOTCONN, sock.getpeername)
            again = socket.socket(fileno=os.dup(sock.fileno()))  # finds out what it is
            assert (again.family, again.type) == (VSOCK, kind)
            again.close()


def options():
    with listener() as server:
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted and ignored
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with socket.socket(VSOCK, socket.SOCK_STREAM) as sock:
        # The standard library takes and gives 64-bit integers here.
        for name, value in ((2, 1 << 20), (1, 4096), (0, 8192)):
            sock.setsockopt(VSOCK, name, value)
            assert sock.getsockopt(VSOCK, name) == value
        sock.setsockopt(VSOCK, 0, 1)  # clamped
        assert sock.getsockopt(VSOCK, 0) == 4096
        fails(errno.EINVAL, sock.setsockopt, VSOCK, 6, 1)  # no struct timeval
        fails(errno.ENOPROTOOPT, sock.getsockopt, VSOCK, 77)
        assert sock.getsockopt(VSOCK, 5) in (0, 1)


def names():
    with socket.socket(VSOCK, socket.SOCK_STREAM) as sock:
        fails(errno.EINVAL, sock.listen)
        fails(errno.EADDRNOTAVAIL, sock.bind, (12345, 4000))
        sock.bind((ANY, 4000))
        assert sock.getsockname()[1] == 4000 and sock.getsockname()[0] != ANY
        fails(errno.EINVAL, sock.bind, (ANY, 4001))
        with socket.socket(VSOCK, socket.SOCK_STREAM) as other:
            fails(errno.EADDRINUSE, other.bind, (ANY, 4000))
            fails(errno.ECONNRESET, other.connect, (LOCAL, 4000))
            fails(errno.EINVAL, other.accept)
            fails(errno.ENOTCONN, other.shutdown, socket.SHUT_RDWR)
    with socket.socket(VSOCK, socket.SOCK_STREAM) as other:
        other.bind((ANY, 4000))  # free again
    with socket.socket(VSOCK, socket.SOCK_STREAM) as sock:
        fails(errno.EHOSTUNREACH, sock.connect, (987654, 1))
    fails(errno.EOPNOTSUPP, socket.socketpair, VSOCK)


def streams():
    client, accepted = pair()
    fails(errno.EISCONN, client.connect, (LOCAL, 1))
    data = os.urandom(1 << 20)
    writer = threading.Thread(target=client.sendall, args=(data,))
    writer.start()
    got = b"".join(chunks(accepted, len(data)))
    writer.join()
    assert got == data
    client.sendall(b"1234567")
    wait_for(accepted, select.POLLIN)
    assert struct.unpack("i", fcntl.ioctl(accepted, termios.FIONREAD, bytes(4))) == (7,)
    assert struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4))) == (0,)
    assert accepted.recv(3, socket.MSG_PEEK) == b"123" and accepted.recv(100) == b"1234567"
    fails(errno.EAGAIN, accepted.recv, 1, socket.MSG_DONTWAIT)
    fails(errno.EAGAIN, accepted.recvmsg, 1, 0, socket.MSG_ERRQUEUE)
    client.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    accepted.sendall(b"half")
    assert client.recv(10) == b"half"
    fails(errno.EPIPE, client.send, b"x")
    accepted.close()
    assert client.recv(1) == b""
    client.close()


def chunks(sock, size):
    while size:
        data = sock.recv(size)
        size -= len(data)
        yield data


def wait_for(sock, event):
    poll = select.poll()
    poll.register(sock, event)
    ((_, events),) = poll.poll(10_000)
    return events


def packets():
    client, accepted = pair(socket.SOCK_SEQPACKET)
    client.send(b"one")
    client.sendmsg([b"tw", b"o"], [], socket.MSG_EOR)
    client.send(b"three", socket.MSG_EOR)
    client.send(b"four" * 100, socket.MSG_EOR)
    client.send(b"five", socket.MSG_EOR)
    data, _, shown, _ = accepted.recvmsg(100)
    assert (data, shown) == (b"one", 0)
    data, _, shown, _ = accepted.recvmsg(100)
    assert (data, shown) == (b"two", socket.MSG_EOR)
    data, _, shown, _ = accepted.recvmsg(100, 0, socket.MSG_PEEK)
    assert (data, shown) == (b"three", socket.MSG_EOR)
    assert accepted.recv(100) == b"three"
    data, _, shown, _ = accepted.recvmsg(10)
    assert (data, shown) == (b"fourfourfo", socket.MSG_EOR | socket.MSG_TRUNC)
    assert accepted.recv(2) == b"fi"
    size = client.getsockopt(VSOCK, 0)
    fails(errno.EMSGSIZE, client.send, bytes(size + 1))
    assert client.send(bytes(size)) == size
    client.close()
    accepted.close()


def datagrams():
    a, b = (socket.socket(VSOCK, socket.SOCK_DGRAM) for _ in "ab")
    for sock in (a, b):
        sock.bind((LOCAL, ANY))
    there = b.getsockname()
    assert a.sendto(b"one", there) == 3
    data, source = b.recvfrom(100)
    assert (data, source) == (b"one", a.getsockname())
    fails(errno.EINVAL, a.send, b"nowhere")
    a.connect(there)
    assert a.getpeername() == there
    for send in (
        a.send,
        lambda data: os.write(a.fileno(), data),
        lambda d: os.writev(a.fileno(), [d]),
    ):
        assert send(b"two") == 3
        assert b.recv(100) == b"two"
    assert a.sendmsg([b"thr", b"ee"]) == 5
    assert b.recvmsg(3) == (b"thr", [], socket.MSG_TRUNC, a.getsockname())
    a.send(b"four")
    assert b.recvfrom(2, socket.MSG_PEEK) == (b"fo", a.getsockname())
    buffer = bytearray(2)
    assert b.recvfrom_into(buffer, 2, socket.MSG_TRUNC) == (4, a.getsockname())
    fails(errno.EMSGSIZE, a.send, bytes(69_609))
    assert a.send(bytes(69_608)) == 69_608 and len(b.recv(100_000)) == 69_608
    fails(errno.EOPNOTSUPP, a.listen)
    fails(errno.ECONNREFUSED, a.sendto, b"x", (LOCAL, 3))
    b.settimeout(0.05)
    with contextlib.suppress(TimeoutError):
        b.recvfrom(1)
    b.setblocking(True)
    thread = threading.Thread(target=lambda: a.sendto(b"late", there))
    thread.start()
    assert b.recvfrom(10) == (b"late", a.getsockname())
    thread.join()
    a.close()
    b.close()


def polling():
    with listener() as server, socket.socket(VSOCK, socket.SOCK_STREAM) as client:
        server.setblocking(False)
        fails(errno.EAGAIN, server.accept)
        client.setblocking(False)
        epoll = select.epoll()
        epoll.register(client, select.EPOLLOUT)
        assert client.connect_ex(server.getsockname()) == errno.EINPROGRESS
        assert epoll.poll(10)[0][0] == client.fileno()
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert wait_for(server, select.POLLIN) == select.POLLIN
        accepted, _ = server.accept()
        assert os.get_blocking(accepted.fileno())
        assert select.select([client], [], [], 0) == ([], [], [])
        accepted.send(b"x")
        assert select.select([client], [], [], 10)[0] == [client]
        assert client.recv(1) == b"x"
        accepted.close()
        epoll.close()
    with socket.socket(VSOCK, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        assert client.connect_ex((LOCAL, 3)) == errno.EINPROGRESS
        wait_for(client, select.POLLOUT)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    with socket.socket(VSOCK, socket.SOCK_STREAM) as client:
        client.settimeout(20)  # Python's own polling connect
        fails(errno.ECONNRESET, client.connect, (LOCAL, 3))


def shared():
    with listener() as server:
        copy = socket.socket(fileno=os.dup(server.fileno()))
        client = socket.socket(VSOCK, socket.SOCK_STREAM)
        twin = os.dup(client.fileno())
        client.connect(server.getsockname())
        child = os.fork()
        if child == 0:
            accepted, _ = copy.accept()
            accepted.sendall(b"from the child")
            os._exit(0)
        assert os.read(twin, 100) == b"from the child"
        os.waitpid(child, 0)
        script = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]));"
        script += "c, a = s.accept(); c.send(b'%d' % s.family); print(s.getsockname())"
        other = socket.socket(VSOCK, socket.SOCK_STREAM)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(server.fileno())],
            pass_fds=[server.fileno()],
            stdout=subprocess.PIPE,
        ) as process:
            other.connect(server.getsockname())
            assert other.recv(10) == b"40"
            assert process.communicate()[0].decode().strip() == str(server.getsockname())
        a, b = socket.socketpair()
        socket.send_fds(a, [b"x"], [other.fileno(), server.fileno()])
        _, fds, _, _ = socket.recv_fds(b, 1, 2)
        passed = socket.socket(fileno=fds[0])
        assert passed.family == VSOCK and passed.getpeername() == other.getpeername()
        assert socket.socket(fileno=fds[1]).getsockname() == server.getsockname()


def threads():
    # All servers wait in accept() when a connection comes in; none may delay those that follow.
    with listener(backlog=128) as server:

        def serve():
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(accepted.recv(10))

        def ask(number):
            with socket.socket(VSOCK, socket.SOCK_STREAM) as client:
                client.connect(server.getsockname())
                client.sendall(b"%d" % number)
                assert client.recv(10) == b"%d" % number
                answered.append(number)

        answered = []
        everybody = [threading.Thread(target=serve) for _ in range(120)]
        everybody += [threading.Thread(target=ask, args=(n,)) for n in range(120)]
        for thread in everybody:
            thread.start()
        for thread in everybody:
            thread.join()
        assert sorted(answered) == list(range(120))


def event_loop():
    async def main():
        with listener() as server:
            server.setblocking(False)
            loop = asyncio.get_running_loop()
            client = socket.socket(VSOCK, socket.SOCK_STREAM)
            client.setblocking(False)
            connecting = loop.create_task(loop.sock_connect(client, server.getsockname()))
            accepted, _ = await loop.sock_accept(server)
            await connecting
            reader, writer = await asyncio.open_connection(sock=client)
            await loop.sock_sendall(accepted, b"line\n")
            assert await reader.readline() == b"line\n"
            writer.close()
            accepted.close()

    asyncio.run(main())


def device():
    for path_flags in (os.O_RDONLY, os.O_RDWR | os.O_CLOEXEC):
        fd = os.open("/dev/vsock", path_flags)
        (cid,) = struct.unpack("I", fcntl.ioctl(fd, 0x7B9, bytes(4)))
        assert struct.unpack("i", fcntl.ioctl(fd, 0x7B8, bytes(4))) == (40,)
        os.close(fd)
    with socket.socket(VSOCK, socket.SOCK_DGRAM) as sock:
        sock.bind((ANY, ANY))
        assert sock.getsockname()[0] == cid
        assert struct.unpack("I", fcntl.ioctl(sock, 0x7B9, bytes(4))) == (cid,)


def others():
    """Check that features unrelated to vSockets still work."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    _accepted, address = server.accept()
    assert address == client.getsockname()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET
    a, b = socket.socketpair()
    assert a.family == socket.AF_UNIX and a.getsockname() == ""
    socket.send_fds(a, [b"x"], [1])
    assert socket.recv_fds(b, 1, 1)[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.sendto(b"udp", udp.getsockname())
        assert udp.recvfrom(10) == (b"udp", udp.getsockname())
    fails(errno.ENOTTY, fcntl.ioctl, server, 0x7B9, bytes(4))
    fails(errno.ENOENT, os.open, "/dev/vsocket", os.O_RDONLY)


for test in (
    flags,
    options,
    names,
    streams,
    packets,
    datagrams,
    polling,
    shared,
    threads,
    event_loop,
    device,
    others,
):
    try:
        test()
    except BaseException:
        print("failed:", test.__name__, flush=True)
        raise
print("all well")
