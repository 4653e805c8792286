"""A page in headless Chromium, used as people use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

#: Timeout of every wait for the page, in seconds, on a busy machine.
PATIENCE = 50.0


class Browser:
    """A browser window."""

    def __init__(self, driver: webdriver.Chrome, screenshots: Path) -> None:
        self.driver = driver
        self._screenshots = screenshots

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until ``condition`` is true, and return its value."""
        return WebDriverWait(self.driver, PATIENCE, 0.1).until(lambda _: condition(), what)

    def wait_for_text(self, selector: str, text: str) -> None:
        """Wait until a matching element is visible and contains ``text``."""
        self.wait(
            lambda: any(text in found for found in self.texts(selector)),
            f"{text!r} in {selector}",
        )

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the visible elements, read in one step because elements change."""
        return self.run(  # type: ignore[no-any-return]
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter(one => one.checkVisibility()).map(one => one.textContent)",
            selector,
        )

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def focused(self) -> str:
        """Return the accessible name of the focused element."""
        name = self.driver.switch_to.active_element.accessible_name
        assert isinstance(name, str)
        return name

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def errors(self) -> list[str]:
        """Return the browser's errors since the last call: scripts, and what it was asked
        to load that is not there, or against the policy.

        Not connections that were cut off: pages and servers end while they have some.
        """
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        messages = [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
        return [message for message in messages if "net::ERR_" not in message]

    def prefer(self, **features: str) -> None:
        """Set the user's preferences: ``color_scheme="dark"``."""
        wanted = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})

    def photograph(self, name: str) -> None:
        """Save a screenshot."""
        path = self._screenshots / f"{name}.png"
        assert self.driver.save_screenshot(path)
        assert path.stat().st_size > 10_000  # bytes; an empty screenshot is smaller

    def check(self, state: str) -> None:
        """Check light and dark style by axe (contrast included), and save screenshots."""
        for scheme in ("light", "dark"):
            self.prefer(color_scheme=scheme)
            self.photograph(f"{state}-{scheme}")
            wrong = Axe().run(self.driver)["violations"]
            assert not wrong, [
                (rule["id"], [node["html"] for node in rule["nodes"]]) for rule in wrong
            ]


@contextmanager
def chromium(screenshots: Path) -> Iterator[Browser]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (
        "--headless=new",
        "--window-size=1400,1100",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--no-sandbox",  # unavailable to root and in some containers; only this page is loaded
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    window = webdriver.Chrome(options, service)
    try:
        window.set_page_load_timeout(PATIENCE)
        window.set_script_timeout(PATIENCE)
        yield Browser(window, screenshots)
    finally:
        window.quit()
