"""httpx over vSockets: ``httpx.Client(transport=VsockTransport())``, URLs ``http://CID:PORT/``."""

import sys

import httpcore
import httpx

import vsockets


class VsockStream(httpcore.NetworkStream):
    def __init__(self, sock):
        self._sock = sock

    def read(self, max_bytes, timeout=None):
        self._sock.settimeout(timeout)
        try:
            return self._sock.recv(max_bytes)
        except TimeoutError as error:
            raise httpx.ReadTimeout(str(error)) from error

    def write(self, buffer, timeout=None):
        self._sock.settimeout(timeout)
        try:
            self._sock.sendall(buffer)
        except TimeoutError as error:
            raise httpx.WriteTimeout(str(error)) from error

    def close(self):
        self._sock.close()

    def get_extra_info(self, info):
        return self._sock if info == "socket" else None


class VsockBackend(httpcore.NetworkBackend):
    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        try:
            return VsockStream(vsockets.create_connection((int(host), port), timeout))
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error


class VsockTransport(httpx.BaseTransport):
    def __init__(self):
        self._pool = httpcore.ConnectionPool(network_backend=VsockBackend())

    def handle_request(self, request):
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        answer = self._pool.handle_request(
            httpcore.Request(
                request.method,
                url,
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer.stream))

    def close(self):
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, stream):
        self._stream = stream

    def __iter__(self):
        yield from self._stream

    def close(self):
        self._stream.close()


if __name__ == "__main__":
    with httpx.Client(transport=VsockTransport()) as client:
        print(client.get(sys.argv[1]).text, end="")
