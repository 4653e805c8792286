"""Routes of ``vsock web``, and the access that each requires.

Every user of the machine can connect to a loopback port, and every web site can make a browser
send requests to it.  Therefore a printed link works once, and sets a cookie that scripts cannot
read and requests from other sites do not carry; the Host header must be a loopback address, which
excludes names rebound to it (DNS rebinding); and requests that change something must come from
this page (Origin header).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from ...control import Control
from ...guestrpc.client import announce_suspend
from ..connect import administrator
from ..http_server import Request, Response, text
from ..limits import WEB_SESSIONS_MAX
from .watcher import Watcher

#: Length of a token in bytes: too long to guess.
_TOKEN = 32


class Access:
    """The link that is valid now, and the sessions that links have opened."""

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

        Returns the value of the Set-Cookie header, or None for an invalid or used token.
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
    """Return whether two strings are equal, compared in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def _policy(default: str) -> tuple[str, str]:
    rest = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    return ("Content-Security-Policy", f"{default}; {rest}")


_POLICY = _policy("default-src 'self'")

#: Headers of every response: nothing from other sites, no framing, no caching.
_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)

_CLOSED_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; display: grid; place-content: center; min-height: 100vh; padding: 1.25rem;
  font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 34rem; padding: 1.4rem 1.6rem; border: 1px solid; border-radius: 12px; }
h1 { margin: 0 0 .5rem; font-size: 1.35rem; }
p { margin: 0; }
"""

#: Page for clients without a session; its style is inline, as files need a session.
_CLOSED = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>vsock web</title>
<style>{_CLOSED_STYLE}</style>
<main>
<h1>This page is closed</h1>
<p>Open the link that <code>vsock web</code> printed last. Each link works once, in one browser.</p>
</main>
</html>
"""


#: Page that a used link returns.  It is not an HTTP redirection: if the link was followed from
#: another site, the browser would not send the SameSite=Strict cookie with it.
_ENTERED = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=/">
<link rel="icon" href="/icon.svg">
<title>vsock web</title>
<p><a href="/">vsock web</a></p>
</html>
"""


_DIGEST = base64.b64encode(hashlib.sha256(_CLOSED_STYLE.encode()).digest()).decode()
_CLOSED_POLICY = _policy(f"default-src 'none'; style-src 'sha256-{_DIGEST}'")


class BadAction(Exception):
    """Invalid request for an action; the text names what was expected."""


class Site:
    """The HTTP handler of ``vsock web``."""

    def __init__(self, access: Access, watcher: Watcher, entered: Callable[[], None]) -> None:
        """Create the handler; ``entered`` is called when a link was used and replaced."""
        self._access = access
        self._watcher = watcher
        self._entered = entered
        self._files = {
            "/" if file.name == "index.html" else f"/{file.name}": (
                _TYPES[file.name.rpartition(".")[2]],
                file.read_bytes(),
            )
            for file in files(__package__).joinpath("page").iterdir()
        }

    async def answer(self, request: Request) -> Response:
        """Return the response to ``request``."""
        response = await self._route(request)
        own = {name for name, _ in response.headers}
        policy = () if _POLICY[0] in own else (_POLICY,)
        return Response(
            response.status,
            response.content_type,
            response.body,
            (*policy, *_HEADERS, *response.headers),
        )

    async def _route(self, request: Request) -> Response:
        if request.method not in ("GET", "POST"):
            return text(405, "method not allowed (use GET or POST)")
        if not self._access.is_same_site(request):
            return text(
                403,
                f"forbidden (expected a request to http://{self._access.host} from its own pages)",
            )
        if request.method == "GET" and request.path == "/" and "token" in request.query:
            cookie = self._access.enter(request.query["token"])
            if cookie is not None:
                self._entered()
                return Response(200, _TYPES["html"], _ENTERED.encode(), [("Set-Cookie", cookie)])
        if not self._access.has_session(request):
            return Response(401, _TYPES["html"], _CLOSED.encode(), [_CLOSED_POLICY])
        request.keep()
        return await self._route_in_session(request)

    async def _route_in_session(self, request: Request) -> Response:
        if request.path == "/actions":
            if request.method != "POST":
                return text(405, "method not allowed (use POST)")
            return await self._act(request)
        if request.method != "GET":
            return text(405, "method not allowed (use GET)")
        if request.path == "/stream":
            last = request.headers.get("last-event-id", "")
            after = int(last) if last.isdecimal() and len(last) < 20 else None
            return Response(200, "text/event-stream", self._watcher.messages(after))
        if request.path not in self._files:
            return text(404, "not found")
        return Response(200, *self._files[request.path])

    async def _act(self, request: Request) -> Response:
        try:
            action = _read_action(request.body)
            answer = await asyncio.to_thread(_perform, action)
        except BadAction as error:
            return _json(400, {"error": str(error)})
        except OSError as error:
            return _json(409, {"error": error.strerror or str(error)})
        return _json(200, answer)


def _perform(action: Callable[[Control], dict[str, Any]]) -> dict[str, Any]:
    with administrator() as control:
        return {"streams_left": len(action(control)["streams_left"])}


def _read_action(body: bytes) -> Callable[[Control], dict[str, Any]]:
    """Return a function that sends the requested action to vsockd, which checks its values.

    Raises BadAction if the body is invalid.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAction("body: expected JSON") from None
    match request:
        case {"action": "suspend", "cid": int(cid)}:
            return lambda control: _suspend(control, cid)
        case {"action": "resume", "cid": int(cid)}:
            return lambda control: control.resume(cid)
        case {"action": "disconnect", "local": [int(), int()], "peer": [int(), int()]}:
            local, peer = request["local"], request["peer"]
            return lambda control: control.disconnect(local, peer)
    raise BadAction("action: expected suspend or resume with cid, or disconnect with local, peer")


def _suspend(control: Control, cid: int) -> dict[str, Any]:
    announce_suspend(control.folder, cid)
    return control.suspend(cid)


def _json(status: int, value: dict[str, Any]) -> Response:
    return Response(status, "application/json", json.dumps(value).encode())
