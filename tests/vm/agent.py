"""Agent in the guest: runs Python code that the host sends, one line each, and returns its results.

It contains nothing of vsockets: guest programs use the kernel's AF_VSOCK as any program does.  A
request is ``(number, source)``; the reply is ``(number, ok, result)`` with the value of the
variable ``result`` after the code, or a traceback.
"""

import _thread
import ast
import sys
import traceback

COMMON: dict[str, object] = {}
lock = _thread.allocate_lock()


def perform(number: int, source: str) -> None:
    try:
        names: dict[str, object] = dict(COMMON)
        exec(compile(source, "<host>", "exec"), names)
        if names.pop("common", False):
            COMMON.update(names)
        answer = number, True, names.get("result")
    except BaseException as error:
        code = getattr(error, "errno", None)
        answer = number, False, (type(error).__name__, code, traceback.format_exc())
    with lock:
        sys.stdout.write(f"\n@{answer!r}\n")
        sys.stdout.flush()


with lock:
    sys.stdout.write("\n@(0, True, 'ready')\n")
    sys.stdout.flush()
for line in sys.stdin:
    if line.startswith("("):
        _thread.start_new_thread(perform, ast.literal_eval(line))
