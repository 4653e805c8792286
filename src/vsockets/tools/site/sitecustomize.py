"""What ``vsock run`` puts before the first line of every Python program it runs.

Python imports this module at start.  It makes vSockets the standard library's AF_VSOCK, and
then is out of the way: another ``sitecustomize`` that this one hides is found and run.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types


def _chain() -> None:
    """Run the module this one hides, under its own name."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec(__name__, others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[__name__] = module
        spec.loader.exec_module(module)


def _import_vsockets() -> types.ModuleType:
    """The package: this interpreter's own, or else the one this file belongs to.

    It is loaded from its folder, not by a new entry in sys.path: beside it may stand the
    packages of another environment, made for another version of Python.
    """
    try:
        import vsockets
    except ImportError:
        folder = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
        spec = importlib.util.spec_from_file_location(
            "vsockets", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )
        assert spec is not None
        assert spec.loader is not None
        vsockets = sys.modules["vsockets"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(vsockets)
        except BaseException:
            del sys.modules["vsockets"]
            raise
    return vsockets


try:
    _import_vsockets().install()
except Exception as error:  # the program may get along without vSockets
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(f"vsock run: no vSockets in Python {version}: {error}\n")
_chain()
