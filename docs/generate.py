"""Write the pages of docs/ that are made from the source: ``python docs/generate.py``.

``limits.md`` lists every limit of every ``limits.py``; ``api.md`` is the reference of the public
names.  ``tests/architecture/test_generated_pages.py`` fails while a page is out of date.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import vsockets

SOURCE = Path(vsockets.__file__).parent
HERE = Path(__file__).parent

#: The public modules, and what each page of the reference says first.
PUBLIC = {
    "vsockets": "The library: sockets, addresses and contexts.",
    "vsockets.control": "The administrator's side: contexts, states, events.",
    "vsockets.testing": "A private fabric for tests.",
}


def limits_page() -> str:
    """Return the page of all limits."""
    lines = [
        "# Limits",
        "",
        "For readers who change the code or ask why something was refused. Every limit is named",
        "`<AREA>_<WHAT>_<UNIT>` and has its reason beside it, in the file that heads its table.",
        "`docs/generate.py` writes this page.",
    ]
    for path in sorted(SOURCE.rglob("limits.py")):
        rows = list(_limits(path))
        if rows:
            name = path.relative_to(SOURCE.parent)
            lines += ["", f"## `src/{name}`", "", "| limit | value | reason |", "|---|---|---|"]
            lines += [f"| `{name}` | {value} | {reason} |" for name, value, reason in rows]
    return "\n".join(lines) + "\n"


def _limits(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and reason of each limit of a module."""
    module = importlib.import_module(
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    )
    text = path.read_text().splitlines()
    for node in ast.parse("\n".join(text)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.AnnAssign):
            target = node.target
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            yield target.id, _value(getattr(module, target.id)), _reason(text, node.lineno - 1)


def _value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|")


def _reason(text: list[str], line: int) -> str:
    """Return the comment above ``line``, or above the limits just before it."""
    while line and text[line - 1].strip() and not text[line - 1].startswith("#:"):
        line -= 1
    comment: list[str] = []
    while line and text[line - 1].startswith("#:"):
        line -= 1
        comment.insert(0, text[line].removeprefix("#:").strip())
    return " ".join(comment).replace("|", "\\|")


def api_page() -> str:
    """Return the reference of the public names."""
    lines = [
        "# API reference",
        "",
        "For readers who write programs with the library. These names are public and stay; every",
        "other module is the project's own and may change. `docs/generate.py` writes this page",
        "from the docstrings.",
    ]
    for name, summary in PUBLIC.items():
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", summary]
        constants = []
        for member in _public_names(module):
            value = getattr(module, member)
            if inspect.isclass(value) or callable(value):
                lines += _entry(member, value)
            elif isinstance(value, int):
                constants.append(f"`{member}` ({int(value):#x})")
        if constants:
            lines += ["", "Constants: " + ", ".join(constants) + "."]
    return "\n".join(lines) + "\n"


def _public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
    return list(names)


def _entry(name: str, value: Callable[..., object]) -> list[str]:
    """Return the lines about a function, or about a class and its methods."""
    if not inspect.isclass(value):
        return ["", f"### `{name}{_signature(value)}`", "", *_text(value)]
    lines = ["", f"### class `{name}`", "", *_text(value)]
    for member, attribute in vars(value).items():
        if member.startswith("_") or not inspect.getdoc(attribute):
            continue
        if isinstance(attribute, (staticmethod, classmethod)):
            attribute = attribute.__func__
        if isinstance(attribute, property):
            lines += ["", f"- **`{member}`**", "", *_indented(attribute)]
        elif inspect.isfunction(attribute):
            lines += ["", f"- **`{member}{_signature(attribute)}`**", "", *_indented(attribute)]
    return lines


def _signature(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    shown = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return re.sub(r"<([\w.]+)[^>]*>", r"\1", str(shown))


def _text(value: object) -> list[str]:
    text = inspect.getdoc(value) or ""
    text = re.sub(r":(?:\w+:)?\w+:`[~.!]?([^`]+)`", r"`\1`", text)  # roles of Sphinx
    return text.replace("``", "`").splitlines()


def _indented(value: object) -> list[str]:
    return textwrap.indent("\n".join(_text(value)), "  ").splitlines()


PAGES = {"limits.md": limits_page, "api.md": api_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
