# SPDX-License-Identifier: Apache-2.0
"""Two backends on one machine that serve one image, and a model of what guests wrote."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import Daemon, cowshed, new_run_dir, until, write_image

from cowshed.transport import ByteDisk, connect

PAGE = 4096
SIZE = 4 << 20


class Host:
    """One backend: start() it again after a kill; its state stays."""

    def __init__(self, name: str, run_dir: Path, image: Path) -> None:
        self.name = name
        self.run_dir = run_dir
        self.image = image
        self.extra: list[str] = []
        self.daemon: Daemon | None = None
        self.port = 0
        self._place: socket.socket | None = None
        self.takes_handoffs = True

    def start(self, *extra: str, before: tuple[str, ...] = (), **how: Any) -> Host:
        """Start the daemon; the arguments are kept for the next start."""
        self.extra = list(extra) or self.extra
        self._hold_port()
        arguments = [
            *self.serves(),
            "--capacity=32M",
            *self.options(),
            *self.extra,
        ]
        self.daemon = Daemon(self.run_dir, arguments, before=before, **how)
        self.daemon.wait_ready()
        until(lambda: all(image["digest"] for image in self.the_daemon.status()["images"]))
        return self

    def _hold_port(self) -> None:
        """Reserve a port while this backend is away; the backend may listen there."""
        if self._place is None:
            self._place = socket.socket()
            self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._place.bind(("127.0.0.1", self.port))
            self.port = self._place.getsockname()[1]

    def options(self) -> list[str]:
        """Return the options for its addresses and its accepted peers."""
        accepts = ["--accept-handoff"] if self.takes_handoffs else []
        return [f"--listen=tcp://127.0.0.1:{self.port}", *accepts]

    def serves(self) -> list[str]:
        """Return the options for its images."""
        return ["--image", f"d={self.image}"]

    @property
    def the_daemon(self) -> Daemon:
        assert self.daemon is not None
        return self.daemon

    @property
    def unix(self) -> str:
        return f"unix://{self.run_dir}/cowshed.sock"

    @property
    def tcp(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def kill(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.process.wait()

    def end(self) -> None:
        """End all its processes."""
        if self.daemon is not None:
            self.daemon.end()
        if self._place is not None:
            self._place.close()
            self._place = None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return cowshed(arguments[0], "--run-dir", str(self.run_dir), *arguments[1:])

    def drain(self, *arguments: str) -> dict[str, Any]:
        """Drain, which must succeed; return the report."""
        done = self.run("drain", "--json", *arguments)
        assert done.returncode == 0, f"{done.stderr}\n{self.the_daemon.log()}"
        return dict(json.loads(done.stdout))

    def wait_movable(self, *arguments: str) -> None:
        """Wait until the target takes its guests: a drained target releases them with a delay."""
        until(lambda: self.run("drain", "--dry-run", *arguments).returncode == 0)

    def guests(self) -> set[str]:
        return {guest["name"] for guest in self.the_daemon.status()["guests"]}

    @contextlib.contextmanager
    def open(self, guest: str, token: str = "token") -> Iterator[ByteDisk]:
        """Open a guest that maps nothing; its private pages are kept."""
        with connect(self.tcp) as backend, backend.open("d", guest=guest, token=token) as disk:
            assert isinstance(disk, ByteDisk)
            yield disk


class Model:
    """The bytes that a guest should read: the image, and its own writes."""

    def __init__(self, image: Path, seed: int) -> None:
        self.bytes = bytearray(image.read_bytes())
        self.random = random.Random(seed)

    def write(self, disk: Any, nr: int = 20) -> None:
        for _ in range(nr):
            offset = self.random.randrange(SIZE - 20000)
            data = self.random.randbytes(self.random.choice((1, 700, 4096, 20000)))
            disk.write(offset, data)
            self.bytes[offset : offset + len(data)] = data

    def discard(self, disk: Any, page: int, image: Path) -> None:
        disk.discard(page * PAGE, PAGE)
        with image.open("rb") as file:
            file.seek(page * PAGE)
            self.bytes[page * PAGE : (page + 1) * PAGE] = file.read(PAGE)

    def check(self, disk: Any) -> None:
        step = 1 << 20
        for offset in range(0, len(self.bytes), step):
            right = self.bytes[offset : offset + step]
            assert disk.read(offset, len(right)) == right, offset


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "image.raw", SIZE)


@pytest.fixture
def hosts(image: Path) -> Iterator[tuple[Host, Host]]:
    """Two backends, not started."""
    with new_run_dir() as one, new_run_dir() as two:
        pair = Host("a", one, image), Host("b", two, image)
        yield pair
        for host in pair:
            host.end()


@pytest.fixture
def pair(hosts: tuple[Host, Host]) -> tuple[Host, Host]:
    """Two backends that serve."""
    return hosts[0].start(), hosts[1].start()
