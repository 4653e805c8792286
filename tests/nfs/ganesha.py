"""Debian's nfs-ganesha, modified by nothing, in a network with the portmapper it wants."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from vsockets.testing import wait_until

#: Its ports in that network, as docs/nfs.md has them; MOUNT is on another one than NFS.
PORT, MOUNT_PORT = 2049, 2048

#: How long it may take to start, in seconds: it takes one.
_START = 60.0

#: Where its configuration is, as people are told to write it.
_DOCUMENT = Path(__file__).parents[2] / "docs" / "nfs.md"

#: What becomes the portmapper, and keeps the namespaces: its port and the path of its socket are
#: fixed, and it becomes a user of Debian's.  Copies of other tests' mounts would keep them alive.
_PORTMAPPER = """\
set -e
ip link set lo up
mount -t tmpfs none /run
mount --bind {passwd} /etc/passwd
umount --all --lazy --types fuse.vsock-nfs || true
exec {root}/sbin/rpcbind -f
"""


class PrivateGanesha:
    """A server of ``export`` that nobody else reaches, as a context manager.

    ``root`` is where it is unpacked; it writes below ``folder``.
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

    def within(self, *command: str) -> tuple[str, ...]:
        """``command``, to be run where ganesha's ports are at 127.0.0.1."""
        return ("nsenter", f"--net=/proc/{self._processes[0].pid}/ns/net", *command)

    def start(self) -> None:
        """Start it, for the first time or after :meth:`kill`; returns when it serves."""
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
        wait_until(lambda: self._says("NFS SERVER INITIALIZED"), "ganesha to serve", _START)

    def kill(self) -> None:
        """End it as a power cut would."""
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
            self._lives()
            # Until the script has become rpcbind what is in /run may be the machine's own.
            mine = (process / "comm").read_text() == "rpcbind\n"
            return mine and (process / "root/run/rpcbind.sock").exists()

        wait_until(serves, "rpcbind to serve", _START)

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

    def _says(self, words: str) -> bool:
        self._lives()
        return self._log.exists() and words in self._log.read_text(errors="replace")

    def _lives(self) -> bool:
        if self._processes[-1].poll() is None:
            return True
        said = (self._folder / "ganesha.out").read_text(errors="replace")
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        raise RuntimeError(f"it has ended:\n{said[-2000:]}\n{log[-2000:]}")
