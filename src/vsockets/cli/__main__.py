"""``python -m vsockets.cli`` is ``vsock``, where the scripts folder is not on the PATH."""

import sys

from . import main

sys.exit(main())
