"""Rules and fixtures of all tests: no kernel AF_VSOCK, no fabric but the tests' own, one RabbitMQ.

They leave no trace in the user's home folder, nor in the working tree.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import costs
import no_kernel_vsock
import scheduling
import traces
from vsockets.control import Control
from vsockets.testing.rabbitmq import PrivateRabbitMQ

no_kernel_vsock.install()

_scratch = Path(tempfile.mkdtemp(prefix="vsock-", dir="/tmp"))
os.environ["VSOCKETS_TRANSPORT"] = "fabric"
os.environ["VSOCKETS_DIR"] = str(_scratch / "fabric")
os.environ.pop("VSOCKETS_CONTEXT", None)
# The filter of no_kernel_vsock would make "auto" select ptrace.
os.environ["VSOCKETS_INTERCEPTOR"] = os.environ.get("VSOCKETS_INTERCEPTOR", "notify")
os.environ.pop("PYTEST_ADDOPTS", None)  # for these tests, not for the pytest that some start
os.environ.pop("COLUMNS", None)  # tests' programs print whole lines wherever the tests run
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit it
    traces.replace_home(_scratch / "home")

# Shells ignore these for a program in the background, and so would all that it starts.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # a program begins with the default again

# A busy machine makes no test fail.
hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
if "CI" not in os.environ:  # there Hypothesis has a profile of its own, which repeats itself
    hypothesis.settings.load_profile("any-speed")


def pytest_configure(config: pytest.Config) -> None:
    """Count what the test files cost."""
    config.pluginmanager.register(costs.Costs())


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take note of the working tree; once, and not in each worker."""
    if not hasattr(session.config, "workerinput"):
        session.config.stash[traces.BEFORE] = traces.files(session.config.rootpath)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files for parallel workers."""
    if hasattr(config, "workerinput"):
        items.sort(key=scheduling.order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker run the files that share virtual machines."""
    return scheduling.scheduler(config, log)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if the tests have left something in the working tree."""
    before = session.config.stash.get(traces.BEFORE, None)
    if before is None:
        return
    if left := sorted(traces.files(session.config.rootpath) - before):
        print(f"\nERROR: the tests have left in {session.config.rootpath}: {', '.join(left)}")
        session.exitstatus = traces.LEFT  # also if tests have failed


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop a vsockd that was started on demand, and remove what it had."""
    try:
        with Control(_scratch / "fabric") as control:
            control.stop()
    except OSError:
        pass  # there was none
    shutil.rmtree(_scratch, ignore_errors=True)


@pytest.fixture(scope="session")
def path_with_rabbitmq() -> str:
    """``PATH`` with Debian's RabbitMQ in it, which need not be installed."""
    from vm import downloads  # here: few tests need it

    try:
        return os.pathsep.join((downloads.rabbitmq(), os.environ["PATH"]))
    except downloads.Unavailable as error:
        if os.environ.get("VSOCKETS_REQUIRE_VM"):
            raise
        pytest.skip(f"no RabbitMQ: {error}")


@pytest.fixture(scope="session")
def rabbitmq(path_with_rabbitmq: str) -> Iterator[PrivateRabbitMQ]:
    """A cluster of two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path_with_rabbitmq)
        with PrivateRabbitMQ(2, ("/", "orders")) as cluster:
            yield cluster
