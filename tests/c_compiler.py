"""The C compilers that tests use; a test skips where one of them, or its headers, is missing."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

import pytest


@functools.cache
def problem_of(compiler: str) -> str:
    """Return what is missing to compile and link with ``compiler``; empty if nothing is."""
    if shutil.which(compiler) is None:
        return f"{compiler} is missing (apt install what .ci/run does)"
    # A compiler is installed without the C library's headers by --no-install-recommends.
    done = subprocess.run(
        [compiler, "-E", "-x", "c", "-"],
        input=b"#include <fcntl.h>\n",
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return f"{compiler}: the C library's headers are missing (apt install libc6-dev)"
    return ""


def require_compiler(compiler: str) -> None:
    """Skip the test unless ``compiler`` can compile and link."""
    if problem := problem_of(compiler):
        pytest.skip(problem)


def compile_c(*arguments: str | os.PathLike[str], compiler: str = "gcc") -> None:
    """Run ``compiler`` with ``-Wall -Werror`` and ``arguments``, or skip the test without it."""
    require_compiler(compiler)
    command = [compiler, "-Wall", "-Werror", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
