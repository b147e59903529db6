# SPDX-License-Identifier: Apache-2.0
"""A daemon with an image, and other projects' NBD clients."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from domains import Daemon

MIB = 1 << 20
SIZE = 8 * MIB
EXTENT = 65536
SECONDS = 60


class Site:
    """A daemon that serves the file at path as "d"."""

    def __init__(self, daemon: Daemon, path: Path) -> None:
        self.daemon = daemon
        self.path = path
        self.socket = daemon.run_dir / "nbd.sock"

    def uri(self, export: str = "d") -> str:
        return f"nbd+unix:///{quote(export, safe='@/')}?socket={self.socket}"

    @property
    def address(self) -> tuple[str, int]:
        """Return its TCP address, with --nbd 127.0.0.1:0."""
        match = re.search(r"event=nbd url=nbds?://([0-9.]+):(\d+)", self.daemon.log())
        assert match, "the daemon listens nowhere else"
        return match[1], int(match[2])

    def tcp_uri(self, export: str = "d") -> str:
        host, port = self.address
        return f"nbd://{host}:{port}/{export}"

    def nbdsh(self, code: str, export: str = "d", uri: str | None = None) -> str:
        """Run lines of Python with libnbd's handle `h`, connected; return what they print."""
        return run("nbdsh", "-u", uri or self.uri(export), "-c", code)

    def map(self, context: str, export: str = "d") -> list[tuple[int, int, int]]:
        """Return offset, length and type of each extent from nbdinfo --map."""
        told = json.loads(run("nbdinfo", "--json", f"--map={context}", self.uri(export)))
        return [(one["offset"], one["length"], one["type"]) for one in told]

    def cowshed(self, *words: str, status: int = 0) -> str:
        """Run a cowshed command on it; return its output."""
        command = [sys.executable, "-m", "cowshed.service.cli", *words]
        return run(*command, "--run-dir", str(self.daemon.run_dir), status=status)

    def content(self) -> bytes:
        return self.path.read_bytes()


def run(
    *words: str, status: int = 0, uid: int | None = None, environment: dict[str, str] | None = None
) -> str:
    """Run a program; return its stdout and stderr. AssertionError for another status."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"needs the program {words[0]}: `make setup` as root installs it")
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
        # nbdsh runs the first python3 of PATH; only the system's has libnbd.
        env={
            **os.environ,
            "HOME": "/",
            "PATH": f"/usr/bin:{os.environ['PATH']}",
            **(environment or {}),
        },
    )
    assert done.returncode == status, f"{words}: status {done.returncode}: {done.stdout}"
    return done.stdout
