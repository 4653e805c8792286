"""ssh into a guest without a network: paramiko on a vSockets stream."""

import paramiko

import vsockets


def connect(cid, port=22, **options):
    """A connected client; ``options`` are those of ``SSHClient.connect``."""
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    try:
        client.connect(f"vsock-{cid}", sock=vsockets.create_connection((cid, port)), **options)
    except BaseException:
        client.close()
        raise
    return client
