"""``vsock web`` in a browser: its states, and its use."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import vsockets
from vsockets import Attachment
from vsockets.guestrpc.packets import RPCI_PORT
from vsockets.testing import PrivateFabric, wait_until

from ..played_tools import PlayedTools
from ..vsock import Running, Vsock

pytest.importorskip("selenium", reason="needs selenium (pip install -e '.[dev]')")

from selenium.webdriver.common.keys import Keys

from .browser import Browser, chromium

pytestmark = pytest.mark.timeout(300)  # Chromium on a busy machine


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("screenshots")) as browser:
        yield browser


@pytest.fixture
def web(vsock: Vsock, browser: Browser) -> Iterator[Running]:
    """The open page, with data."""
    running = open_page(vsock, browser)
    yield running
    # The stream ends with vsock web, which is no error.
    assert not [error for error in browser.errors() if "/stream" not in error]
    browser.prefer()
    browser.driver.get("about:blank")


def open_page(vsock: Vsock, browser: Browser) -> Running:
    running = vsock.start("web", "--interval", "0.2")
    browser.driver.get(running.error_line().removeprefix("open "))
    browser.wait_for_text("#vsockd", "vsockd ")
    return running


def test_the_browser_is_opened_through_a_file(
    vsock: Vsock, browser: Browser, tmp_path: Path, fabric: PrivateFabric
) -> None:
    """The file is another site to the browser, which tests the SameSite cookie."""
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\ncd {tmp_path}; echo "$1" >new; mv new address\n')
    program.chmod(0o755)
    vsock.environment["BROWSER"] = f"{program} %s"
    vsock.start("web", "--interval", "0.2", "--open")
    wait_until((tmp_path / "address").exists, "the browser to be started")
    browser.driver.get((tmp_path / "address").read_text().strip())
    browser.wait_for_text("#vsockd", "vsockd ")
    browser.driver.get("about:blank")


@pytest.fixture
def guests(fabric: PrivateFabric) -> Iterator[list[Attachment]]:
    guests = [fabric.guest(name=name) for name in ("web", "database")]
    yield guests
    for guest in guests:
        fabric.control.power_off(guest.cid)
        fabric.control.remove_context(guest.cid)


@contextlib.contextmanager
def streams(
    fabric: PrivateFabric, guest: Attachment, number: int
) -> Iterator[Sequence[socket.socket]]:
    """Open ``number`` streams from the guest to the host; yield the guest's ends."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            vsockets.create_server((2, 5000), backlog=number, context=fabric.host)
        )
        ends = []
        for _ in range(number):
            ends.append(stack.enter_context(vsockets.create_connection((2, 5000), context=guest)))
            stack.enter_context(server.accept()[0])
        yield ends


def test_nobody_there(web: Running, browser: Browser) -> None:
    browser.wait_for_text("#graph-words", "Only the host exists")
    assert browser.texts("#contexts tbody tr td:nth-child(2)") == ["host"]
    assert browser.texts("#no-streams") == ["No streams."]
    assert browser.texts("#no-events")
    browser.check("empty")


def test_busy(
    web: Running, browser: Browser, fabric: PrivateFabric, guests: list[Attachment]
) -> None:
    first, second = guests
    with streams(fabric, first, 3) as ends:
        ends[0].sendall(b"seven..")
        browser.wait_for_text("#graph-words", "The host and 2 guests, 3 streams between them")
        cid = first.cid
        name = f"context {cid} web, running, 3 streams"
        assert browser.one(f"#nodes [data-key='{cid}']").accessible_name == name
        assert browser.texts(f"#edges [data-key='stream-{cid}-2'] text") == ["3"]
        row = browser.texts(f"#contexts [data-key='{cid}'] td")
        assert row[:5] == [str(cid), "web", "● running", "3", "3"]
        browser.wait(
            lambda: (
                ["0", "7"]
                in browser.run(
                    "return [...document.querySelectorAll('#streams tbody tr')].map("
                    "row => [row.cells[4].textContent, row.cells[5].textContent])"
                )
            ),
            "the bytes that are unread at the far end",
        )
        browser.check("busy")
        # Choosing a context in the graph, by keyboard.
        browser.one(f"#nodes [data-key='{second.cid}']").send_keys(Keys.ENTER)
        browser.wait_for_text("#streams-title", f"Streams of context {second.cid} database")
        assert browser.texts("#streams tbody tr") == []
        browser.one("#show-all").click()
        browser.wait(lambda: len(browser.texts("#streams tbody tr")) == 3, "all streams")
    browser.wait_for_text("#graph-words", "0 streams")


def test_a_rate(
    web: Running, browser: Browser, fabric: PrivateFabric, guests: list[Attachment]
) -> None:
    guest = guests[0]
    browser.wait(lambda: browser.texts("#total-connects") == ["0"], "the first rates")
    browser.run(
        "window.seen = new Set();"
        "new MutationObserver(() => {"
        " const cell = document.querySelector(arguments[0]);"
        " if (cell) seen.add(cell.textContent);"  # the row is removed with the context
        "})"
        ".observe(document.querySelector('#contexts'),"
        " { subtree: true, childList: true, characterData: true })",
        f"#contexts [data-key='{guest.cid}'] td:nth-child(6)",
    )
    with streams(fabric, guest, 5):
        browser.wait_for_text("#graph-words", "5 streams")
    browser.wait(
        lambda: any(text[0] in "123456789" for text in browser.run("return [...seen]")), "a rate"
    )


def test_suspend_and_resume_by_keyboard(
    web: Running, browser: Browser, fabric: PrivateFabric, guests: list[Attachment]
) -> None:
    cid = guests[0].cid
    button = f"#contexts [data-key='{cid}'] td:last-child button"
    with streams(fabric, guests[0], 2) as ends:
        browser.wait_for_text("#graph-words", "2 streams")
        suspend = browser.one(button)
        assert suspend.accessible_name == f"Suspend context {cid} web"
        suspend.send_keys(Keys.ENTER)
        browser.wait_for_text("#question-words", "Its 2 streams are closed")
        assert browser.focused() == "Cancel"
        browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        browser.wait(lambda: not browser.texts("#question-title"), "the question to be closed")
        assert browser.focused() == f"Suspend context {cid} web"
        suspend.send_keys(Keys.ENTER)
        browser.wait_for_text("#question-title", f"Suspend context {cid} web?")
        browser.check("question")
        browser.one("#question-yes").send_keys(Keys.ENTER)
        browser.wait_for_text("#said", f"Context {cid} is suspended.")
        assert ends[0].recv(1) == ends[1].recv(1) == b""
    browser.wait_for_text(f"#contexts [data-key='{cid}']", "suspended")
    browser.wait_for_text("#events", f"{cid} web: suspend, 2 streams ended")
    assert "suspended" in browser.one(f"#nodes [data-key='{cid}']").accessible_name
    assert browser.focused() == f"Resume context {cid} web"  # the same button, still
    browser.check("suspended")
    browser.one(button).send_keys(Keys.ENTER)
    browser.wait_for_text("#said", f"Context {cid} is resumed.")
    browser.wait_for_text(f"#contexts [data-key='{cid}']", "running")


def test_disconnect(
    web: Running, browser: Browser, fabric: PrivateFabric, guests: list[Attachment]
) -> None:
    with streams(fabric, guests[0], 2) as (one, other):
        name = "{}:{} to 2:5000".format(*one.getsockname())
        button = f"#streams button[aria-label='Disconnect {name}']"
        browser.wait(lambda: browser.texts(button), "the stream")
        browser.one(button).click()
        browser.wait_for_text("#question-title", f"Disconnect {name}?")
        browser.one("#question-yes").click()
        browser.wait_for_text("#said", f"The stream {name} is closed.")
        one.settimeout(10)
        assert one.recv(1) == b""
        browser.wait(lambda: len(browser.texts("#streams tbody tr")) == 1, "one stream fewer")
        other.sendall(b"goes on")
    browser.wait_for_text("#events", "requested by pid")


def test_denied(
    web: Running, browser: Browser, fabric: PrivateFabric, guests: list[Attachment]
) -> None:
    first, second = guests
    with pytest.raises(OSError):
        vsockets.create_connection((second.cid, 5000), context=first)
    browser.wait_for_text("#events .denial", f"{first.cid}:any to {second.cid}:5000")
    browser.wait_for_text(f"#contexts [data-key='{first.cid}'] td:nth-child(10)", "1")
    browser.wait_for_text("#heard", "guest to guest")  # the text for screen readers
    # A denial is drawn for some seconds; this clock keeps it.
    browser.run("Date.now = () => arguments[0]", 0)
    with pytest.raises(OSError):
        vsockets.create_connection((second.cid, 5000), context=first)
    edge = f"#edges [data-key='denial-{first.cid}-{second.cid}'] text"
    browser.wait_for_text(edge, "guest-to-guest")
    node = browser.one(f"#nodes [data-key='{first.cid}']")
    assert node.accessible_name.endswith("denied a moment ago")
    browser.check("denied")


def test_restart_of_vsockd(alone: Vsock, browser: Browser) -> None:
    alone("up")
    open_page(alone, browser)
    browser.wait_for_text("#graph-words", "Only the host exists")
    alone("down")
    browser.wait_for_text("#trouble", "vsockd is not running in")
    browser.wait_for_text("#events", "vsockd has ended")
    browser.check("gone")
    browser.run("document.body.style.minHeight = '3000px'; window.scrollTo(0, 2000)")
    top = "return document.querySelector('#trouble').getBoundingClientRect().top"
    assert browser.run(top) >= 0
    alone("up")
    browser.wait(lambda: not browser.texts("#trouble"), "vsockd to be seen again")
    browser.wait_for_text("#events", "vsockd is back")
    alone("context", "add", "7")
    browser.wait_for_text("#graph-words", "1 guest")


def test_vsock_web_ends(web: Running, browser: Browser) -> None:
    web.process.send_signal(signal.SIGTERM)
    web.finish()
    browser.wait_for_text("#trouble", "vsock web does not reply")


def test_page_without_a_session_is_closed(web: Running, browser: Browser) -> None:
    browser.driver.delete_all_cookies()
    browser.driver.get(browser.driver.current_url)
    browser.wait_for_text("h1", "This page is closed")
    browser.check("closed")
    border = "return getComputedStyle(document.querySelector('main')).borderTopWidth"
    assert browser.run(border) == "1px"
    assert all("401" in error for error in browser.errors())


def test_reduced_motion(
    web: Running, browser: Browser, fabric: PrivateFabric, guests: list[Attachment]
) -> None:
    moving = "return getComputedStyle(document.querySelector('.test .line')).animationName"
    browser.run(
        "document.querySelector('#graph').insertAdjacentHTML('beforeend',"
        ' \'<g class="busy test"><path class="line"/></g>\')'
    )
    browser.prefer(reduced_motion="no-preference")
    assert browser.run(moving) == "flow"
    browser.prefer(reduced_motion="reduce")
    assert browser.run(moving) == "none"


#: Pairs of contexts whose boxes overlap.
OVERLAPS = """
const boxes = [...document.querySelectorAll('#nodes .node')].map(
  node => [node.dataset.key, node.querySelector('rect').getBoundingClientRect()]);
const apart = (one, other) => one.right <= other.left || other.right <= one.left
  || one.bottom <= other.top || other.bottom <= one.top;
return boxes.flatMap(([key, box], at) => boxes.slice(at + 1)
  .filter(([_, other]) => !apart(box, other)).map(([other]) => `${key} ${other}`));
"""


@pytest.mark.parametrize("number", [2, 9, 11, 24, 25, 40, 60, 61, 75, 98])
def test_boxes_do_not_overlap(
    web: Running, browser: Browser, fabric: PrivateFabric, number: int
) -> None:
    guests = [fabric.guest() for _ in range(number)]
    try:
        browser.wait_for_text("#graph-words", f"{number} guests")
        assert browser.run(OVERLAPS) == []
    finally:
        for guest in guests:
            fabric.control.remove_context(guest.cid)


def test_a_long_name_gives_way(web: Running, browser: Browser, fabric: PrivateFabric) -> None:
    guest = fabric.guest(2503520146, name="a-virtual-machine-with-a-rather-long-name " * 2)
    try:
        button = f"#contexts [data-key='{guest.cid}'] td:last-child button"
        browser.wait(lambda: browser.texts(button), "the guest")
        wide = "const box = document.querySelector('#contexts').parentElement;"
        size = browser.driver.get_window_size()
        for width in (1300, size["width"]):
            browser.driver.set_window_size(width, size["height"])
            assert browser.run(f"{wide} return box.scrollWidth - box.clientWidth") == 0, width
        browser.photograph("long")
    finally:
        fabric.control.remove_context(guest.cid)


def test_a_hundred_guests_on_a_telephone(
    web: Running, browser: Browser, fabric: PrivateFabric
) -> None:
    size = browser.driver.get_window_size()
    browser.driver.set_window_size(500, 900)
    guests = [fabric.guest() for _ in range(120)]
    try:
        browser.wait_for_text("#contexts-left-out", "21 more")
        width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.run(width) == 0
        browser.photograph("many")
        assert browser.run(OVERLAPS) == []
        # Text of the graph is almost as large as on a large screen.
        height = "return document.querySelector('#nodes text').getBoundingClientRect().height"
        assert browser.run(height) > 9
    finally:
        browser.driver.set_window_size(size["width"], size["height"])
        for guest in guests:
            fabric.control.remove_context(guest.cid)


def test_claims_of_a_guest_are_text(
    web: Running, vsock: Vsock, browser: Browser, guests: list[Attachment], tmp_path: Path
) -> None:
    """The column exists while a guest is enabled; a guest's words are no markup."""
    assert browser.texts("#tools-column:not([hidden])") == []
    guest = guests[0]
    service = vsock.start("guestinfo", "serve", "--state", tmp_path / "state")
    assert "serving" in service.error_line()
    vsock("guestinfo", "enable", guest.cid)
    name = '<img src=x onerror="document.body.remove()">\x1b[2J'
    with PlayedTools(guest, RPCI_PORT) as tools:
        assert tools.ask(b"SetGuestInfo  1 " + name.encode()) == b"1 "
    shown = "not running, " + name.replace("\x1b", "\\x1b")
    cell = f"#contexts [data-key='{guest.cid}'] td:nth-child(12)"
    browser.wait(lambda: browser.texts(cell) == [shown], "the claim")
    assert browser.texts("#tools-column:not([hidden])") == ["VMware Tools claim"]
    browser.check("claims")
