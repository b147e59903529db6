# SPDX-License-Identifier: Apache-2.0
"""A stand-in for systemd that holds descriptors for a service and restarts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from cowshed.service.persist.notice import Notice


class Supervisor:
    """Holds the descriptors that it is sent, passes them on, and restarts the service."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.address = log.with_name("notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.address))
        self.socket.settimeout(60)
        self.words = words
        self.log = log
        self.groups: dict[str, list[int]] = {}
        self.start()

    def start(self) -> None:
        names = [name for name, fds in self.groups.items() for _ in fds]
        held = [fd for fds in self.groups.values() for fd in fds]
        script = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
        script += f"[os.dup2(fd, 900 + i) for i, fd in enumerate({held})]; "
        script += f"[os.dup2(900 + i, 3 + i) for i in range({len(held)})]; "
        script += "os.execv(sys.argv[1], sys.argv[1:])"
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.address),
            "LISTEN_FDS": str(len(held)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script, *self.words],
                env=environment,
                pass_fds=held,
                stderr=log,
            )
        self.listen_until("READY")

    def listen_until(self, word: str) -> None:
        while True:
            datagram, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
            fields = Notice.parse(datagram).fields
            if fields.get("FDSTORE") == "1":
                self.groups.setdefault(fields["FDNAME"], []).extend(fds)
            if fields.get("FDSTOREREMOVE") == "1":
                for fd in self.groups.pop(fields["FDNAME"]):
                    os.close(fd)
            if fields.get(word) == "1":
                return

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()
        for fds in self.groups.values():
            for fd in fds:
                os.close(fd)
