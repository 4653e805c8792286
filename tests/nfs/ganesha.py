"""Debian's unmodified nfs-ganesha, in a network namespace with a portmapper."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from vsockets.testing import wait_until

#: Ganesha's ports in that namespace, as in docs/nfs.md; MOUNT has its own port.
PORT, MOUNT_PORT = 2049, 2048

#: Timeout of a start in seconds: it takes one.
_START_TIMEOUT = 60.0

#: The document with ganesha's configuration, which the tests use.
_DOCUMENT = Path(__file__).parents[2] / "docs" / "nfs.md"

#: Script of the process that becomes the portmapper and keeps the namespaces alive.  The
#: portmapper's port and socket path are fixed, and it switches to a user of Debian's.  Copies of
#: other tests' mounts are unmounted: they would keep those mounts alive.
_PORTMAPPER = """\
set -e
ip link set lo up
mount -t tmpfs none /run
mount --bind {passwd} /etc/passwd
umount --all --lazy --types fuse.vsock-nfs || true
exec {root}/sbin/rpcbind -f
"""


class PrivateGanesha:
    """A private server of ``export``, as a context manager.

    ``root`` is the directory of the unpacked packages; the server writes below ``folder``.
    """

    def __init__(self, root: Path, folder: Path, export: Path) -> None:
        self._root, self._folder, self._export = root, folder, export
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = folder / "ganesha.log"
        folders = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/ganesha")
        libraries = os.pathsep.join(str(root / name) for name in folders)
        self._environment = {**os.environ, "LD_LIBRARY_PATH": libraries}

    def __enter__(self) -> PrivateGanesha:
        try:
            self._start_portmapper()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._processes:
            self.kill()

    def in_namespace(self, *command: str) -> tuple[str, ...]:
        """Return ``command`` run in the namespace, where ganesha's ports are at 127.0.0.1."""
        return ("nsenter", f"--net=/proc/{self._processes[0].pid}/ns/net", *command)

    def start(self) -> None:
        """Start the server, also after :meth:`kill`; return when it serves."""
        self._log.unlink(missing_ok=True)
        configuration = self._folder / "ganesha.conf"
        configuration.write_text(self._configuration())
        namespaces = f"/proc/{self._processes[0].pid}/ns"
        self._run(
            *("nsenter", f"--net={namespaces}/net", f"--mount={namespaces}/mnt"),
            *(str(self._root / "usr/bin/ganesha.nfsd"), "-F", "-N", "EVENT"),
            *("-f", str(configuration), "-L", str(self._log)),
            *("-p", str(self._folder / "ganesha.pid")),
        )
        wait_until(
            lambda: self._has_logged("NFS SERVER INITIALIZED"), "ganesha to serve", _START_TIMEOUT
        )

    def kill(self) -> None:
        """Kill the server, as a power cut would."""
        process = self._processes.pop()
        process.send_signal(signal.SIGKILL)
        process.wait()

    def _configuration(self) -> str:
        found = re.search(r"^NFS_CORE_PARAM \{.*?(?=^```)", _DOCUMENT.read_text(), re.M | re.S)
        assert found is not None
        plugins = f'Plugins_Dir = "{self._root}/usr/lib/x86_64-linux-gnu/ganesha";'
        return (
            found[0]
            .replace("NFS_CORE_PARAM {", f"NFS_CORE_PARAM {{ {plugins}")
            .replace("/srv/shared", str(self._export))
            .replace(" Root_Squash", " No_Root_Squash")
        )

    def _start_portmapper(self) -> None:
        passwd = self._folder / "passwd"
        passwd.write_text(
            Path("/etc/passwd").read_text() + "_rpc:x:65533:65534::/run/rpcbind:/bin/false\n"
        )
        script = _PORTMAPPER.format(root=self._root, passwd=passwd)
        self._run("unshare", "--net", "--mount", "sh", "-c", script)
        process = Path(f"/proc/{self._processes[0].pid}")

        def serves() -> bool:
            self._check_alive()
            # Before the script becomes rpcbind, /run may be the machine's own.
            replaced = (process / "comm").read_text() == "rpcbind\n"
            return replaced and (process / "root/run/rpcbind.sock").exists()

        wait_until(serves, "rpcbind to serve", _START_TIMEOUT)

    def _run(self, *command: str) -> None:
        with open(self._folder / "ganesha.out", "ab") as out:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )

    def _has_logged(self, words: str) -> bool:
        self._check_alive()
        return self._log.exists() and words in self._log.read_text(errors="replace")

    def _check_alive(self) -> bool:
        if self._processes[-1].poll() is None:
            return True
        output = (self._folder / "ganesha.out").read_text(errors="replace")
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        raise RuntimeError(f"ganesha has ended:\n{output[-2000:]}\n{log[-2000:]}")
