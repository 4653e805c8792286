"""For tests of programs that use vSockets: a private fabric, and a pytest plugin.

Nothing here needs pytest but the module ``plugin``, which pytest finds by itself.
"""

from .fabric import FabricFailed, PrivateFabric
from .waiting import wait_until

__all__ = ["FabricFailed", "PrivateFabric", "wait_until"]
