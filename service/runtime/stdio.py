# SPDX-License-Identifier: Apache-2.0
"""Fill descriptors 0, 1 and 2 if they are closed, as init scripts and daemonize leave them.

Otherwise the next file that is opened gets such a number, and output meant for stdout goes into it.
As in coreutils, /dev/null takes their place, opened so that reading stdin and writing stdout fail:
a command whose output is lost must show it by its exit status. Output to stderr is dropped.
Programs that this one executes find the numbers closed again.
"""

from __future__ import annotations

import os
import sys
from typing import Final

__all__ = ["flush_stdout", "occupy_stdio", "silence_stdout"]

_MODES: Final = (os.O_WRONLY, os.O_RDONLY, os.O_RDWR)


def occupy_stdio() -> None:
    """Fill descriptors 0, 1 and 2; to be called before any file is opened."""
    for fd, mode in enumerate(_MODES):
        try:
            os.fstat(fd)
        except OSError:
            _put_null(fd, mode)
    # The interpreter sets a stream to None if its descriptor was closed at start.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False, errors="replace")
    sys.stderr = sys.stderr or os.fdopen(2, "w", 1, closefd=False, errors="replace")


def flush_stdout() -> None:
    """Write buffered output; OSError if it is lost."""
    sys.stdout.flush()


def silence_stdout() -> None:
    """Drop unwritten output, which the interpreter would try to write again at exit."""
    _put_null(1, os.O_WRONLY)


def _put_null(fd: int, mode: int) -> None:
    null = os.open(os.devnull, mode)
    if null != fd:
        os.dup2(null, fd, inheritable=False)
        os.close(null)
