"""A test of the product's users: a static program as the agent of a guest.

``with_podman.py`` runs it in a container.
"""

from __future__ import annotations

import os
import subprocess

from vsockets.testing import PrivateFabric

AGENT = os.environ["AGENT"]


def test_the_agent_serves_the_host(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest()
    agent = vsock_fabric.popen(guest, [AGENT, "serve", "8"], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    port = agent.stdout.readline().strip()
    call = [AGENT, "call", str(guest.cid), port, "8"]
    done = vsock_fabric.run(vsock_fabric.host, call, capture_output=True, text=True)
    assert (done.stdout, done.stderr, agent.wait(60)) == ("echoed\n", "", 0)
