"""RabbitMQ used from inside a machine: a stock client, the guest's kernel, the VMCI device."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import pika
import pytest

from amqp.programs.messages import read
from amqp.stage import PROGRAMS, Proxies
from vsockets.testing.rabbitmq import PrivateRabbitMQ

from . import downloads
from .machine import Machine

pytestmark = pytest.mark.timeout(300)

COUNT = 3000
QUEUE = "from-a-machine"

#: Timeout in seconds for the guest, which is emulated.
PATIENCE = 120.0


def client() -> bytes:
    """Return a zip archive of pika and the publishing program, for Python to run."""
    memory = io.BytesIO()
    root = Path(pika.__file__).parent
    with zipfile.ZipFile(memory, "w") as archive:
        for path in root.rglob("*.py"):
            archive.write(path, path.relative_to(root.parent))
        for name in ("messages.py", "publish_pika.py"):
            archive.write(PROGRAMS / name, name)
        archive.writestr("__main__.py", "import publish_pika\n")
    return memory.getvalue()


@pytest.mark.parametrize("machine", ["stable"], indirect=True)
def test_machine_with_only_python_uses_rabbitmq(
    machine: Machine, rabbitmq: PrivateRabbitMQ
) -> None:
    machine.put({"/tmp/client.zip": client(), **downloads.tls_libraries()})
    with Proxies(machine.fabric) as proxies:
        _, where = proxies.amqp_proxy(rabbitmq.ports)
        _, host = proxies.host_proxy(where, "--allow-vhost", f"{machine.cid}=/")
        result = machine.run(
            """
            import json, subprocess, sys
            os.system("ip link set lo up")
            environment = {"VSOCKETS_TRANSPORT": "kernel", "PATH": "/bin"}
            command = [sys.executable, "-m", "vsockets.amqp", "--host", host]
            proxy = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            ready = proxy.stderr.readline()
            client = [sys.executable, "/tmp/client.zip", "5672", queue, "3", str(count)]
            done = subprocess.run(client, capture_output=True, text=True)
            proxy.terminate()
            result = ready, done.stdout, done.stderr, proxy.wait(30), proxy.stderr.read()
            """,
            PATIENCE,
            host=host,
            queue=QUEUE,
            count=COUNT,
        )
    ready, output, errors, status, log = result
    assert ready == "vsock: listening on tcp:127.0.0.1:5672\n"
    assert not errors
    assert status == 0, log
    # An emulated machine on a busy host may not reach it in time and retries.
    again = set(json.loads(output.splitlines()[-1])["again"])
    parameters = pika.ConnectionParameters("127.0.0.1", rabbitmq.ports[1])
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        found = []
        while (data := channel.basic_get(QUEUE, auto_ack=True)[2]) is not None:
            found.append(read(data)[1])
    assert set(found) == set(range(COUNT))
    assert {number for number, times in Counter(found).items() if times > 1} <= again
