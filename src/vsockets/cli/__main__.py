"""Entry point of ``python -m vsockets.cli``, the same program as ``vsock``."""

import sys

from . import main

sys.exit(main())
