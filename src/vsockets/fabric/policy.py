"""Who may talk to whom (guide chapter 5).

The profile of ESXi 5.1 and later, which the guide calls the only configuration: a guest
talks with the host and with the hypervisor's services, "communication between virtual
machines is not supported".  Processes of one context may talk with each other (guide page 8,
"interprocess communications on a guest").
"""

from __future__ import annotations

import errno

from .context import Context
from .errors import Refused


def require_path(source: Context, destination: Context) -> None:
    """Raise Refused unless ``source`` may reach ``destination``.

    Between two guests the answer is the one for a CID that does not exist, so a guest
    cannot find out who else is on the host.
    """
    if source is not destination and source.is_guest and destination.is_guest:
        raise Refused(errno.EHOSTUNREACH, "guest to guest: only host to guest is allowed")
