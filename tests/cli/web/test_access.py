"""Access control of ``vsock web``, tested over plain HTTP as an attacker would use it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets.cli.limits import HTTP_CLIENTS_MAX, WEB_SESSIONS_MAX
from vsockets.testing import PrivateFabric, wait_until

from ..vsock import PATIENCE, Running, Vsock


class Client:
    """An HTTP client that sends any request."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.link = running.error_line().removeprefix("open ")
        found = re.fullmatch(r"http://(127\.0\.0\.1:\d+)/\?token=([\w-]{43})", self.link)
        assert found, self.link
        self.host, self.token = found.groups()

    def ask(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, timeout=PATIENCE)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def status(self, method: str, path: str, body: str | None = None, **headers: str) -> int:
        with self.ask(method, path, body, **headers) as answer:
            return answer.status

    def enter(self) -> str:
        """Open the link, and return the cookie."""
        with self.ask("GET", f"/?token={self.token}") as answer:
            assert answer.status == 200
            assert b'http-equiv="refresh" content="0; url=/"' in answer.read()
            cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
        assert attributes == ["HttpOnly", "SameSite=Strict", "Path=/"]
        self.token = self.running.error_line().partition("token=")[2]
        return cookie

    def act(self, cookie: str, action: Any, **headers: str) -> tuple[int, str]:
        """Send a POST request as the page does."""
        wanted = {"Cookie": cookie, "Origin": f"http://{self.host}", **headers}
        with self.ask("POST", "/actions", json.dumps(action), **wanted) as answer:
            return answer.status, answer.read().decode()


@pytest.fixture
def client(vsock: Vsock) -> Client:
    return Client(vsock.start("web", "--interval", "0.1"))


def test_nothing_without_a_session(client: Client) -> None:
    for path in ("/", "/style.css", "/page.js", "/stream", "/nowhere", "/?token=", "//[?token=a"):
        for cookie in ("", "vsock-web=x", f"vsock-web-{client.host.partition(':')[2]}=x", "\xff"):
            assert client.status("GET", path, Cookie=cookie) == 401
    status, _ = client.act("", {"action": "suspend", "cid": 3})
    assert status == 401


def test_a_link_works_once(client: Client) -> None:
    used = client.token
    cookie = client.enter()
    assert client.status("GET", "/", Cookie=cookie) == 200
    assert client.token != used
    assert client.status("GET", f"/?token={used}") == 401
    assert client.enter() != cookie
    assert client.status("GET", "/", Cookie=cookie) == 200  # the first session is still valid


def test_sessions_are_limited(client: Client) -> None:
    cookies = [client.enter() for _ in range(WEB_SESSIONS_MAX + 1)]
    assert client.status("GET", "/", Cookie=cookies[0]) == 401
    assert client.status("GET", "/", Cookie=cookies[1]) == 200
    assert client.status("GET", "/", Cookie=cookies[-1]) == 200


def test_other_clients_cannot_lock_a_browser_out(client: Client) -> None:
    """Clients with a session are counted apart from others, which any user can open."""
    cookie = client.enter()
    host, _, port = client.host.partition(":")
    with contextlib.ExitStack() as stack, Stream(client, cookie) as stream:
        messages = iter(stream)
        assert next(messages)["event"] == "snapshot"
        for _ in range(8):
            for _ in range(HTTP_CLIENTS_MAX // 4):
                silent = stack.enter_context(socket.create_connection((host, int(port))))
                silent.sendall(b"GET ")
            assert client.status("GET", "/", Cookie=cookie) == 200
        assert next(messages)["event"] == "snapshot"  # and its connections stay open


def test_long_cookies_are_parsed_in_linear_time(client: Client) -> None:
    """CVE-2024-7592: http.cookies took a second for each of these."""
    cookie = client.enter()
    for quoted in ("\\" * 15_000, "\\101" * 3_700):
        assert client.status("GET", "/", Cookie=f'a="{quoted}"; {cookie}') == 200
        assert client.status("GET", "/", Cookie=f'{cookie.partition("=")[0]}="{quoted}"') == 401


#: A browser that records its arguments, as a desktop would start it.
BROWSER = """#!/bin/sh
tr '\\0' ' ' </proc/$$/cmdline >{folder}/arguments
ls -ld "${{1#file://}}" "$(dirname "${{1#file://}}")" >{folder}/modes
cp "${{1#file://}}" {folder}/page
"""


def test_the_browsers_command_line_does_not_have_the_link(vsock: Vsock, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(BROWSER.format(folder=tmp_path))
    browser.chmod(0o755)
    vsock.environment["BROWSER"] = f"{browser} %s"
    client = Client(vsock.start("web", "--open"))
    page = tmp_path / "page"
    wait_until(lambda: page.exists() and "</html>" in page.read_text(), "the browser to start")
    arguments = (tmp_path / "arguments").read_text()
    assert "file://" in arguments and "token" not in arguments
    modes = {line[:10] for line in (tmp_path / "modes").read_text().splitlines()}
    assert modes == {"-rw-------", "drwx------"}
    assert client.link in page.read_text()
    file = Path(arguments.split("file://")[1].strip())
    assert file.exists()
    client.enter()
    assert not file.parent.exists()


def test_rebound_host_names_are_rejected(client: Client) -> None:
    """DNS rebinding: the browser resolves the attacker's name to this address."""
    cookie = client.enter()
    port = client.host.partition(":")[2]
    for host in (f"attacker.example:{port}", "127.0.0.1", f"127.0.0.1.example:{port}", "::1"):
        assert client.status("GET", "/", Cookie=cookie, Host=host) == 403
        assert client.status("GET", f"/?token={client.token}", Host=host) == 403
    assert client.status("GET", "/", Cookie=cookie, Host=f"localhost:{port}") == 200


def test_requests_of_other_sites(client: Client) -> None:
    """CSRF: without SameSite the browser would send the cookie along."""
    cookie = client.enter()
    action = {"action": "suspend", "cid": 3}
    for origin in ("https://attacker.example", "null", "http://127.0.0.1:1", "http://localhost"):
        assert client.act(cookie, action, Origin=origin)[0] == 403
        assert client.status("GET", "/stream", Cookie=cookie, Origin=origin) == 403
    assert client.status("POST", "/actions", json.dumps(action), Cookie=cookie) == 403


def test_only_post_acts(client: Client) -> None:
    cookie = client.enter()
    assert client.status("GET", "/actions?action=suspend&cid=3", Cookie=cookie) == 405
    origin = f"http://{client.host}"
    assert client.status("POST", "/", "", Cookie=cookie, Origin=origin) == 405
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert client.status(method, "/", Cookie=cookie, Origin=origin) == 405


def test_invalid_actions(client: Client) -> None:
    cookie = client.enter()
    senseless: list[Any] = [
        None,
        [],
        {},
        {"action": "power-off", "cid": 3},
        {"action": "suspend"},
        {"action": "suspend", "cid": "3"},
        {"action": "disconnect", "local": [3, 1], "peer": [2]},
    ]
    for action in senseless:
        status, text = client.act(cookie, action)
        assert (status, "action: expected" in text) == (400, True)
    status, text = client.act(cookie, {"action": "suspend", "cid": 2})
    assert (status, "expected a guest" in text) == (409, True)
    status, text = client.act(cookie, {"action": "disconnect", "local": [3, 1], "peer": [2, 1]})
    assert (status, "no stream between" in text) == (409, True)


def test_actions(client: Client, fabric: PrivateFabric) -> None:
    cookie, guest = client.enter(), fabric.guest()
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        vsockets.create_connection((2, 5000), context=guest) as connected,
        server.accept()[0],
    ):
        local, peer = connected.getsockname(), connected.getpeername()
        answer = client.act(cookie, {"action": "disconnect", "local": local, "peer": peer})
        assert answer == (200, '{"streams_left": 0}')
        connected.settimeout(PATIENCE)
        assert connected.recv(1) == b""
    states = []
    for action in ("suspend", "resume"):
        assert client.act(cookie, {"action": action, "cid": guest.cid})[0] == 200
        rows = fabric.control.contexts()
        states += [row["state"] for row in rows if row["cid"] == guest.cid]
    assert states == ["suspended", "running"]


def test_headers_forbid_other_sites_and_frames(client: Client) -> None:
    cookie = client.enter()
    for path in ("/", "/page.js", "/icon.svg", "/nowhere"):
        with client.ask("GET", path, Cookie=cookie) as answer:
            policy = answer.headers["Content-Security-Policy"].split("; ")
            assert {"default-src 'self'", "frame-ancestors 'none'"} <= set(policy)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.read().decode())


class Stream:
    """A stream of server-sent events."""

    def __init__(self, client: Client, cookie: str, **headers: str) -> None:
        self.answer = client.ask("GET", "/stream", Cookie=cookie, **headers)
        assert self.answer.headers["Content-Type"] == "text/event-stream"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.answer.close()

    def __iter__(self) -> Iterator[dict[str, str]]:
        message: dict[str, str] = {}
        for line in self.answer:
            key, colon, value = line.decode().rstrip("\n").partition(": ")
            if colon:
                message[key] = value
            else:
                yield message
                message = {}

    def happened(self) -> tuple[str, dict[str, Any]]:
        """Return the next event and its number."""
        message = next(one for one in self if one["event"] == "event")
        return message["id"], json.loads(message["data"])


def test_a_reconnected_stream_resumes(client: Client, fabric: PrivateFabric) -> None:
    cookie = client.enter()
    with Stream(client, cookie) as stream:
        assert next(iter(stream))["event"] == "snapshot"
        guests = [fabric.guest(), fabric.guest()]
        number, event = stream.happened()
        assert (event["change"], event["cid"]) == ("added", guests[0].cid)
    with Stream(client, cookie, **{"Last-Event-ID": number}) as stream:
        number, event = stream.happened()
        assert event["cid"] == guests[1].cid
    with Stream(client, cookie, **{"Last-Event-ID": "9" * 30}) as stream:
        assert stream.happened()[1]["cid"] == guests[0].cid


def test_only_loopback_addresses_are_served(vsock: Vsock) -> None:
    vsock.fail(
        ("web --listen tcp:0.0.0.0:8000", 2, "expected tcp:127.0.0.1:PORT"),
        ("web --listen tcp:localhost:8000", 2, "expected tcp:127.0.0.1:PORT"),
        ("web --listen unix:/tmp/x", 2, "expected tcp:127.0.0.1:PORT"),
        ("web --listen udp:127.0.0.1:8000", 2, "expected tcp:127.0.0.1:PORT"),
    )
