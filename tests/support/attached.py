# SPDX-License-Identifier: Apache-2.0
"""A daemon with one image, a copy of its bytes, and programs run by `cowshed attach`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from domains import ANSWER_SECONDS, Daemon, Guest, command, new_run_dir, plain_environment
from stage import PAGE, content

ROOM = Path(__file__).parents[1] / "attach"
# An odd size: the last page is partly past the end. More than its daemon's capacity holds.
IMAGE_BYTES = (1 << 20) - 1000


class Attached:
    """A daemon, an image of it, a copy, and ways to run programs attached to the image."""

    def __init__(self, daemon: Daemon, source: Path, copy: Path) -> None:
        self.daemon = daemon
        self.source = source
        self.copy = copy

    def words(
        self, *program: str | Path, options: Sequence[str] = (), uid: int | None = None
    ) -> list[str]:
        """Return the command line of cowshed attach."""
        run_dir = str(self.daemon.run_dir)
        return command(
            *("attach", "disk", "--run-dir", run_dir, *options, "--", *map(str, program)), uid=uid
        )

    def run(self, *program: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        words = {key: how.pop(key) for key in ("options", "uid") if key in how}
        return subprocess.run(
            self.words(*program, **words),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
            env=plain_environment() | how.pop("env", {}),
            **how,
        )


class AttachedReader(Guest):
    """A reader.py under cowshed attach; its process is the one that was started."""

    def __init__(self, attached: Attached, name: str, options: Sequence[str] = ()) -> None:
        words = attached.words(
            *("python3", ROOM / "reader.py", "{image}", attached.copy),
            options=("--guest", name, *options),
        )
        self._run(words, plain_environment())


def serve_one(run_dir: Path) -> Attached:
    """Start a daemon; the image is larger than its capacity, so pages are evicted all the time."""
    source, copy = run_dir / "image.raw", run_dir / "copy.raw"
    source.write_bytes(content(0, -(-IMAGE_BYTES // PAGE))[:IMAGE_BYTES])
    shutil.copy(source, copy)
    daemon = Daemon(run_dir, ["--image", f"disk={source}", "--capacity", "512K", "--verbose"])
    try:
        daemon.wait_ready()
    except BaseException:
        daemon.kill()
        raise
    return Attached(daemon, source, copy)


@pytest.fixture
def attached(run_dir: Path) -> Iterator[Attached]:
    """A daemon for one test."""
    own = serve_one(run_dir)
    yield own
    own.daemon.kill()


@pytest.fixture(scope="module")
def shared() -> Iterator[Attached]:
    """A daemon that the tests of a file share; they must leave it unchanged."""
    with new_run_dir() as folder:
        common = serve_one(folder)
        yield common
        common.daemon.kill()


StartReader = Callable[..., AttachedReader]


@pytest.fixture
def start_reader(attached: Attached) -> Iterator[StartReader]:
    """Start a reader: start_reader(name, *options of cowshed attach)."""
    readers: list[AttachedReader] = []

    def start(name: str = "reader", *options: str) -> AttachedReader:
        readers.append(AttachedReader(attached, name, options))
        return readers[-1]

    yield start
    for reader in readers:
        reader.close()


@pytest.fixture(scope="session")
def mapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of mapper*.c."""
    program = tmp_path_factory.mktemp("mapper") / "mapper"
    sources = sorted(ROOM.glob("mapper*.c"))
    subprocess.run(
        ["gcc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, *sources],
        check=True,
    )
    return program
