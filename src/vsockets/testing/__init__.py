"""Support for tests of programs that use vSockets: a private fabric, and a pytest plugin.

Only the module ``plugin``, which pytest loads by its entry point, needs pytest.
"""

from .fabric import FabricFailed, PrivateFabric
from .played import PlayedFailed, PlayedMachine
from .waiting import wait_until

__all__ = ["FabricFailed", "PlayedFailed", "PlayedMachine", "PrivateFabric", "wait_until"]
