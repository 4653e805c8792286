"""Access control of ``vsock web``: one-time links, sessions, and checks against other sites.

Every user of the machine can connect to a loopback port, and every web site can make a browser
send requests to it.  Therefore a printed link works once, and sets a cookie that scripts cannot
read and requests from other sites do not carry; the Host header must be a loopback address, which
excludes names rebound to it (DNS rebinding); and requests that change something must come from
this page (Origin header).
"""

from __future__ import annotations

import hmac
import secrets

from ..http_server import Request
from ..limits import WEB_SESSIONS_MAX

#: Length of a token in bytes: too long to guess.
_TOKEN = 32


class Access:
    """The valid link, and the sessions."""

    def __init__(self, where: str) -> None:
        """Create the first link for the served address ``where``, HOST:PORT."""
        self.host = where.removesuffix(":80")  # browsers omit the default port
        host, _, port = where.rpartition(":")
        self._hosts = {self.host}
        if host == "127.0.0.1":
            self._hosts.add(f"localhost:{port}".removesuffix(":80"))
        # Cookies are shared between ports, so that each vsock web needs its own name.
        self._cookie = f"vsock-web-{port}"
        self._link = secrets.token_urlsafe(_TOKEN)
        self._sessions: list[str] = []

    @property
    def link(self) -> str:
        """The URL to open; it works once."""
        return f"http://{self.host}/?token={self._link}"

    def enter(self, token: str) -> str | None:
        """Create a session if ``token`` is that of the current :attr:`link`, and replace the link.

        Return the value of the Set-Cookie header, or None for an invalid or used token.
        """
        if not _same(token, self._link):
            return None
        self._link = secrets.token_urlsafe(_TOKEN)
        session = secrets.token_urlsafe(_TOKEN)
        self._sessions = [*self._sessions[1 - WEB_SESSIONS_MAX :], session]
        return f"{self._cookie}={session}; HttpOnly; SameSite=Strict; Path=/"

    def is_same_site(self, request: Request) -> bool:
        """Return whether ``request`` names the served address and comes from no other site."""
        if request.headers.get("host") not in self._hosts:
            return False
        origin = request.headers.get("origin")
        if origin is None:  # browsers send it with every POST
            return request.method == "GET"
        return origin == f"http://{request.headers['host']}"

    def has_session(self, request: Request) -> bool:
        """Return whether ``request`` comes from a browser in which a link was opened."""
        # http.cookies is not used: its time is quadratic in the length of a quoted value.
        for part in request.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self._cookie:
                return any(_same(value, one) for one in self._sessions)
        return False


def _same(one: str, other: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())
