"""aiohttp over vSockets: ``ClientSession(connector=VsockConnector())``, ``http://CID:PORT/``."""

import aiohttp

import vsockets


class VsockConnector(aiohttp.BaseConnector):
    """As aiohttp's own UnixConnector: it overrides the same method."""

    async def _create_connection(self, req, traces, timeout):
        sock = vsockets.socket()
        try:
            sock.setblocking(False)
            await self._loop.sock_connect(sock, (int(req.url.host), req.url.port))
            _, protocol = await self._loop.create_connection(self._factory, sock=sock)
        except OSError as error:
            sock.close()
            raise aiohttp.ClientConnectorError(req.connection_key, error) from error
        return protocol
