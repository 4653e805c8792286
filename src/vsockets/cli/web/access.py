"""Who may see the page: whoever opens the link that was printed, in the browser it was opened in.

A loopback port is anybody's on this machine, and any web site can have a browser send requests
there.  So a link works once, and what it gives is a cookie that scripts cannot read and that no
other site's request carries; requests name the host by a loopback address, so that no name that
was pointed here since (DNS rebinding) gets in; and what changes something comes from our page.
"""

from __future__ import annotations

import hmac
import secrets

from ..http_server import Request
from ..limits import WEB_SESSIONS_MAX

#: Bytes of a token: nobody guesses one.
_TOKEN = 32


class Access:
    """The links that work still, and the sessions."""

    def __init__(self, where: str) -> None:
        """``where`` is the address served, HOST:PORT."""
        self.host = where.removesuffix(":80")  # which browsers leave out
        host, _, port = where.rpartition(":")
        self._hosts = {self.host}
        if host == "127.0.0.1":
            self._hosts.add(f"localhost:{port}".removesuffix(":80"))
        # Cookies know no ports: another vsock web has its own.
        self._cookie = f"vsock-web-{port}"
        self._link = secrets.token_urlsafe(_TOKEN)
        self._sessions: list[str] = []

    @property
    def link(self) -> str:
        """The address to open, once."""
        return f"http://{self.host}/?token={self._link}"

    def enter(self, token: str) -> str | None:
        """A session for who has the token: the Set-Cookie header's value.  There is another
        :attr:`link` then.  None: it is not, or no longer, the token.
        """
        if not _same(token, self._link):
            return None
        self._link = secrets.token_urlsafe(_TOKEN)
        session = secrets.token_urlsafe(_TOKEN)
        self._sessions = [*self._sessions[1 - WEB_SESSIONS_MAX :], session]
        return f"{self._cookie}={session}; HttpOnly; SameSite=Strict; Path=/"

    def is_for_us(self, request: Request) -> bool:
        """Whether it names us by the address we serve, and no site but ours has sent it."""
        if request.headers.get("host") not in self._hosts:
            return False
        origin = request.headers.get("origin")
        if origin is None:  # browsers send it with every POST
            return request.method == "GET"
        return origin == f"http://{request.headers['host']}"

    def has_session(self, request: Request) -> bool:
        """Whether it comes from a browser in which a link was opened."""
        # Read by hand: http.cookies takes time that grows with the square of a value in quotes.
        for part in request.headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self._cookie:
                return any(_same(value, one) for one in self._sessions)
        return False


def _same(one: str, other: str) -> bool:
    """In a time that does not tell how much of them is the same."""
    return hmac.compare_digest(one.encode(), other.encode())
