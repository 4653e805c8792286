"""Logs: the rate of lines per party, their content, and the size of the file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vsockets.limits import LOG_FILE_MAX_BYTES, LOG_LINES_PER_SECOND, LOG_PARTIES_MAX
from vsockets.logs import Throttle
from vsockets.model.text import printable, word

#: A name with a newline, a terminal escape sequence, and right-to-left text.
EVIL = "a\nvsockd: ERROR: forged\x1b[2K\u202e\x85\u2028\x0c\udcff"


def logged(script: str, form: str = "text", environment: dict[str, str] | None = None) -> str:
    """Return the log of a program that runs ``script``."""
    head = (
        "import logging, sys\nfrom pathlib import Path\nfrom vsockets import logs\n"
        f"logs.configure('prog: %(levelname)s: %(message)s', logging.INFO, {form!r})\n"
        f"log, evil = logging.getLogger('x'), {EVIL!r}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        check=True,
    )
    return done.stderr.decode()


# Rate


def test_limit_applies_to_one_party() -> None:
    text = logged(
        "for n in range(1000): log.warning('of one %d', n, extra=logs.by('one'))\n"
        "log.warning('of another', extra=logs.by('another'))\n"
    )
    lines = text.splitlines()
    of_one = [line for line in lines if "of one" in line]
    assert LOG_LINES_PER_SECOND <= len(of_one) < 500
    assert lines[-1] == "prog: WARNING: of another"


def test_number_of_omitted_lines_is_logged() -> None:
    text = logged(
        "n = 0\n"
        "while n < 1000 or not any(bucket.left_out == 0 for bucket in logs._handler"
        ".filters[0]._throttle._buckets.values()):\n"
        "    log.warning('again', extra=logs.by('one'))\n"
        "    n += 1\n"
        "print(n, file=sys.stderr)\n"
    )
    *lines, number = text.splitlines()
    left_out = sum(map(int, re.findall(r"\((\d+) more were left out\)", text)))
    assert left_out + len(lines) == int(number)


def test_lines_without_a_party_are_limited_by_call_site() -> None:
    text = logged(
        "for n in range(1000):\n"
        "    log.warning('here')\n    log.info('there')\n    log.error('x')\n"
    )
    for line in ("here", "there", "x"):
        assert LOG_LINES_PER_SECOND <= text.count(f": {line}\n") < 500


def test_repeated_lines_and_tracebacks_are_limited() -> None:
    text = logged(
        "for n in range(1000):\n"
        "    log.warning('again', extra=logs.rare('one'))\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError: log.exception('bad', extra=logs.by('one'))\n"
    )
    assert 1 <= text.count("again") < 50
    assert 1 <= text.count("Traceback") < 50


def test_notices_are_not_limited() -> None:
    assert logged("for n in range(200): log.log(logs.NOTICE, 'listening')\n").count("\n") == 200


def test_all_parties_together_are_limited() -> None:
    """One user may have thousands of user IDs."""
    throttle = Throttle(5)
    admitted = [throttle.admit(party) for party in range(10 * LOG_PARTIES_MAX)]
    assert 50 <= len(admitted) - admitted.count(None) < 5000
    assert len(throttle._buckets) == LOG_PARTIES_MAX


def test_omitted_lines_are_reported_once() -> None:
    throttle = Throttle(50)
    admitted = [throttle.admit("one") for _ in range(10_000)]
    assert admitted[:50] == [0] * 50
    while admitted[-1] is None:
        admitted.append(throttle.admit("one"))
    left_out = sum(count for count in admitted if count is not None)
    assert left_out == admitted.count(None) > 0


# Content


@given(st.text())
def test_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
    assert len(f"x{shown}x".splitlines()) == 1


def test_escaped_characters() -> None:
    assert printable("plain text, Üñ") == "plain text, Üñ"
    assert printable(EVIL) == (r"a\nvsockd: ERROR: forged\x1b[2K\u202e\x85\u2028\x0c\udcff")


def test_words() -> None:
    assert [word(text) for text in ("/usr/bin/x", "/ü", "?")] == ["/usr/bin/x", "/ü", "?"]
    assert word("/x (7 more were left out)") == "'/x (7 more were left out)'"
    assert word("/x' y") == '"/x\' y"'
    assert word(EVIL) == repr(EVIL) and word(EVIL).isprintable()


def test_message_stays_on_one_line() -> None:
    text = logged("log.warning('named %s', evil)\nlog.warning('plain')\n")
    first, second, rest = text.split("\n")
    assert (second, rest) == ("prog: WARNING: plain", "")
    assert first.startswith("prog: WARNING: named a ")
    assert first.isprintable()


def test_traceback_lines_are_marked() -> None:
    script = "try: raise OSError(evil)\nexcept OSError: log.exception('bad')\n"
    first, *rest = logged(script).rstrip("\n").split("\n")
    assert first == "prog: ERROR: bad"
    assert len(rest) > 3
    assert all(line.startswith("| ") and line.isprintable() for line in rest)
    assert "| vsockd: ERROR: forged" in "\n".join(rest)


def test_json() -> None:
    script = "try: raise OSError(evil)\nexcept OSError: log.exception('bad %s', evil)\n"
    (line,) = logged(script, "json").splitlines()
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["message"] == f"bad {EVIL}"


def test_the_journal(tmp_path: Path) -> None:
    """Each line has its own priority."""
    with open(tmp_path / "log", "w+b") as log:
        found = os.fstat(log.fileno())
        subprocess.run(
            [
                *(sys.executable, "-c"),
                "import logging\nfrom vsockets import logs\n"
                "logs.configure('%(message)s', logging.INFO, 'text')\n"
                "try: raise OSError('a\\n<0>panic\\x0b<0>panic')\n"
                "except OSError: logging.exception('b\\n<0>panic')\n",
            ],
            env={**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"},
            stderr=log,
            check=True,
        )
        log.seek(0)
        lines = log.read().decode().rstrip("\n").split("\n")
    assert lines[0] == "<3>b <0>panic"
    assert all(line.startswith("<3>| ") for line in lines[1:])


# Size


def test_full_log_file_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logged(
        f"logs.write_to(Path({str(path)!r}))\n"
        f"for n in range(3 * {LOG_FILE_MAX_BYTES} // 1000):\n"
        "    log.log(logs.NOTICE, '%06d %s', n, 1000 * 'x')\n"
    )
    sizes = [found.stat().st_size for found in sorted(tmp_path.iterdir())]
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]
    assert all(0 < size < LOG_FILE_MAX_BYTES + 2000 for size in sizes)
    last = path.read_text().splitlines()[-1]
    assert f"{3 * LOG_FILE_MAX_BYTES // 1000 - 1:06d}" in last


def test_log_file_in_a_removed_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log"
    path.parent.mkdir()
    logged(
        f"logs.write_to(Path({str(path)!r}))\n"
        "import os, shutil\n"
        f"shutil.rmtree({str(path.parent)!r})\n"
        f"for n in range(3 * {LOG_FILE_MAX_BYTES} // 1000):\n"
        "    log.log(logs.NOTICE, '%06d %s', n, 1000 * 'x')\n"
        f"assert os.fstat(2).st_size < {LOG_FILE_MAX_BYTES} + 2000\n"
    )
