"""Settings of a forward, and their TOML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsockets.forward.settings import HostRule, PeerRule, Settings, load
from vsockets.model.locator import Inet, Proxy, Vsock, parse_locator
from vsockets.toml import ConfigurationError


@pytest.mark.parametrize(
    ("source", "target", "options", "problem"),
    [
        ("tcp::1", "vsock:any:3", {}, "expected a target with a CID and a port"),
        ("tcp::1", "vsock:3:any", {}, "expected a target with a CID and a port"),
        ("tcp::1", "tcp::2", {}, "expected a target with a host and a port"),
        ("tcp::1", "udp:a:2", {}, "cannot join datagrams and a stream"),
        ("vsock-dgram::1", "exec:cat", {}, "cannot join datagrams and a stream"),
        ("http-proxy:", "tcp:a:1", {}, "invalid as FROM .expected"),
        ("tcp::1", "fd:3", {}, "invalid as TO .expected"),
        ("tcp::1", "http-proxy:", {}, "no hosts allowed"),
        ("tcp::1", "vsock:3:1", {"allow": (PeerRule(3),)}, "allowed CIDs apply to vSockets"),
        (
            "tcp::1",
            "vsock:3:1",
            {"hosts": (HostRule("a"),)},
            "apply to http-proxy: and socks5:",
        ),
    ],
)
def test_contradictory_settings_are_rejected(
    source: str, target: str, options: dict[str, tuple[PeerRule]], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Settings(parse_locator(source), parse_locator(target), **options)  # type: ignore[arg-type]


def test_all_keys_of_a_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        """
        [[forward]]
        from = "vsock::3128"
        to = "http-proxy:"
        allow = ["3", "4:1-1023"]
        allow_host = ["*.debian.org:443"]
        idle = 300
        connect_timeout = 2.5
        wait = 1
        max_connections = 10

        [[forward]]
        from = "tcp:127.0.0.1:8080"
        to = "vsock:3:80"
        """
    )
    first, second = load(file)
    assert first == Settings(
        parse_locator("vsock::3128"),
        Proxy("http-proxy"),
        allow=(PeerRule(3), PeerRule(4, 1, 1023)),
        hosts=(HostRule("*.debian.org", port=443),),
        idle=300.0,
        connect_timeout=2.5,
        wait=1.0,
        max_connections=10,
    )
    assert second == Settings(Inet("127.0.0.1", 8080), Vsock(3, 80))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", ":1: missing [[forward]]"),
        ("[forward]", "expected tables, each headed [[forward]]"),
        ("[[forward]]", ":1: forward: missing from"),
        ('[[forward]]\nfrom = "tcp::1"', "missing to"),
        ('[[forward]]\nfrom = 3\nto = "tcp:a:1"', ":2: forward.from: 3 is an integer"),
        ('[[forward]]\nfrom = "tcp::1"\nto = "tcp:a"', ":3: forward.to: 'tcp:a': expected tcp:"),
        ('[[forward]]\nfrom = "tcp::1"\nto = "tcp::2"', "expected a target with a host"),
        ('[[forward]]\nfrom = "tcp::1"\nto = "tcp:a:2"\nfro = 1', "did you mean from?"),
        ('[[forward]]\nfrom = "tcp::1"\nto = "tcp:a:2"\nidle = "1"', ":4: forward.idle: "),
        ('[[forward]]\nfrom = "tcp::1"\nto = "tcp:a:2"\nwait = -1', "expected seconds from 0"),
        ('[[forward]]\nfrom = "tcp::1"\nto = "tcp:a:2"\nidle = nan', "expected seconds from 0"),
        ('[[forward]]\nfrom = "vsock::1"\nto = "tcp:a:2"\nallow = ["x"]', "forward.allow: CID"),
        ('[[forward]]\nfrom="tcp::1"\nto="tcp:a:1"\n' * 2, "tcp::1 is already forwarded at "),
    ],
)
def test_mistake_in_a_file_is_reported_with_its_place(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "f.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(file))
