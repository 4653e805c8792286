"""Make README's pictures from real runs: ``python docs/pictures.py`` (needs Chromium and selenium).

``demo.svg`` is the output of ``vsock demo``, ``web.png`` a screenshot of ``vsock web``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import vsockets
from vsockets.testing import PrivateFabric

FOLDER = Path(__file__).parent / "pictures"
VSOCK = (sys.executable, "-m", "vsockets.cli")
#: Largest size of a picture in the repository, in bytes.
LARGEST = 100_000


def make_demo() -> None:
    """Write the output of ``vsock demo`` as SVG."""
    from rich.console import Console
    from rich.text import Text

    done = subprocess.run(
        [*VSOCK, "demo"],
        env={**os.environ, "COLUMNS": "96", "VSOCKETS_TRANSPORT": "fabric"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with open(os.devnull, "w") as nothing:
        console = Console(record=True, width=96, file=nothing)
        console.print(Text(f"$ vsock demo\n{done.stdout.rstrip()}"))
        svg = console.export_svg(title="vsock demo")
    # Without the fonts of another site.
    (FOLDER / "demo.svg").write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def make_web() -> None:
    """Write a screenshot of ``vsock web``: a host service and three guests, one of them denied."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for option in ("--headless=new", "--window-size=1300,1000", "--disable-gpu", "--no-sandbox"):
        options.add_argument(option)
    with PrivateFabric() as fabric, contextlib.ExitStack() as stack:
        server = stack.enter_context(vsockets.create_server((2, 5000), context=fabric.host))
        for name in ("web", "build", "database"):
            guest = fabric.guest(name=name)
            stack.enter_context(vsockets.create_connection((2, 5000), context=guest))
            stack.enter_context(server.accept()[0])
        with contextlib.suppress(OSError):
            vsockets.create_connection((3, 22), context=guest)
        web = subprocess.Popen(
            [*VSOCK, "web", "--interval", "0.2"],
            env=fabric.environment(fabric.host),
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(web.wait)
        stack.callback(web.kill)
        assert web.stderr is not None
        address = web.stderr.readline().split()[-1]
        window = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        stack.callback(window.quit)
        window.get(address)
        threading.Event().wait(2)  # a few of its intervals
        window.save_screenshot(str(FOLDER / "web.png"))


def main() -> None:
    """Make both pictures, and check their sizes."""
    FOLDER.mkdir(exist_ok=True)
    make_demo()
    make_web()
    for picture in FOLDER.iterdir():
        size = picture.stat().st_size
        assert size < LARGEST, f"{picture}: {size} bytes (expected less than {LARGEST})"


if __name__ == "__main__":
    main()
