# SPDX-License-Identifier: Apache-2.0
"""The peer of handoffs: nc copies the same number of bytes from one memfd to another."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from backend import BenchError
from steady_crowd import wait_until

__all__ = ["PipePeer"]

START_SECONDS = 10.0
TRANSFER_SECONDS = 60.0
MIB = 1 << 20


class PipePeer:
    """Transfers by "tcp" over loopback or by "unix"; the memfds live as long as the block."""

    def __init__(self, way: str, nr_bytes: int) -> None:
        if shutil.which("nc") is None:
            raise BenchError("the case restart needs nc: `make setup` as root installs it")
        self._way = way
        self._nr_bytes = nr_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="cowshed-pipe-")
        self._files = [os.memfd_create("bench-pipe") for _ in range(2)]

    def __enter__(self) -> Self:
        for _ in range(self._nr_bytes // MIB):
            os.write(self._files[0], os.urandom(MIB))
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._files:
            os.close(fd)
        self._folder.cleanup()

    def transfer(self) -> None:
        """Return once the other end has written every byte; BenchError if it does not."""
        source, target = self._files
        os.lseek(source, 0, os.SEEK_SET)
        os.ftruncate(target, 0)
        os.lseek(target, 0, os.SEEK_SET)
        where = self._where()
        with subprocess.Popen(["nc", "-l", *where], stdin=subprocess.DEVNULL, stdout=target) as nc:
            try:
                self._wait_listening(where, nc)
                done = subprocess.run(
                    ["nc", "-N", *where], stdin=source, check=False, timeout=TRANSFER_SECONDS
                )
                status = nc.wait(TRANSFER_SECONDS)
            finally:
                nc.kill()
        got = os.fstat(target).st_size
        if done.returncode or status or got != self._nr_bytes:
            raise BenchError(f"nc carried {got} of {self._nr_bytes} bytes by {self._way}")

    def _where(self) -> list[str]:
        if self._way == "unix":
            path = Path(self._folder.name) / "nc"
            path.unlink(missing_ok=True)
            return ["-U", str(path)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            return ["127.0.0.1", str(free.getsockname()[1])]

    def _wait_listening(self, where: list[str], nc: subprocess.Popen[bytes]) -> None:
        def listens() -> bool:
            if nc.poll() is not None:
                raise BenchError(f"nc does not listen at {' '.join(where)}")
            if self._way == "unix":
                listening = f" 00010000 .* {re.escape(where[1])}$"
                return bool(re.search(listening, Path("/proc/net/unix").read_text(), re.MULTILINE))
            port = f":{int(where[1]):04X} 00000000:0000 0A"
            return port in Path("/proc/net/tcp").read_text()

        wait_until("nc listens", START_SECONDS, listens)
