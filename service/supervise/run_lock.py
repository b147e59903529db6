# SPDX-License-Identifier: Apache-2.0
"""One daemon to a run-dir: its owner holds a lock on a file in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cowshed.cache.errors import UsageError

__all__ = ["EXIT_TAKEN", "TakenError", "run_dir_locked"]

# The exit status of a daemon that found another serving: its keeper must not start it again.
EXIT_TAKEN: Final = 4


class TakenError(UsageError):
    """Another daemon owns the run-dir."""


@contextlib.contextmanager
def run_dir_locked(run_dir: Path) -> Iterator[None]:
    """Own a run-dir inside `with`; TakenError if another daemon owns it."""
    try:
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(
            f"cannot use run-dir {str(run_dir)!r}: {error.strerror}; name another with --run-dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "?"
            raise TakenError(
                f"run-dir {str(run_dir)!r} is in use by the daemon with pid {owner}; "
                "stop that, or name another with --run-dir"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)
