# SPDX-License-Identifier: Apache-2.0
"""Processes for the transport's tests: a tiny backend, and guests that can be killed."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbd_stage import nbd
from stage import make_stage, stage

__all__ = ["make_stage", "nbd", "run_guest", "socket_path", "stage", "start_backend"]

HERE = Path(__file__).parent
GUEST_SECONDS = 60


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path for a socket that any user can reach and that is short enough."""
    with tempfile.TemporaryDirectory(prefix="cs-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "s"


@pytest.fixture
def start_backend(socket_path: Path) -> Iterator[Callable[..., str]]:
    """Start tiny_backend.py with these arguments; gives its uri."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> str:
        command = [sys.executable, str(HERE / "tiny_backend.py"), str(socket_path), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return f"unix://{socket_path}"

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def run_guest() -> Callable[..., str]:
    """Run one of guests.py to its end; gives its output."""

    def run(name: str, uri: str, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, str(HERE / "guests.py"), name, uri, *arguments],
            capture_output=True,
            text=True,
            timeout=GUEST_SECONDS,
            check=False,
        )
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout

    return run
