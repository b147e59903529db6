# SPDX-License-Identifier: Apache-2.0
"""Descriptors 0, 1 and 2, which a caller may have closed: init scripts and daemonize do.

Left closed, the next file that is opened gets such a number, and what is meant for stdout goes into
it. As coreutils does it, /dev/null takes the place, opened so that reading stdin and writing stdout
fail: a command whose answer is lost must say so by its exit status. What is meant for stderr is
lost, quietly. Programs that we execute find the numbers closed again, as we did.
"""

from __future__ import annotations

import os
import sys
from typing import Final

__all__ = ["flush_stdout", "occupy_stdio", "silence_stdout"]

_MODES: Final = (os.O_WRONLY, os.O_RDONLY, os.O_RDWR)


def occupy_stdio() -> None:
    """Have something at 0, 1 and 2; to be done before anything else is opened."""
    for fd, mode in enumerate(_MODES):
        try:
            os.fstat(fd)
        except OSError:
            _put_null(fd, mode)
    # What was closed when the interpreter began is None there.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False, errors="replace")
    sys.stderr = sys.stderr or os.fdopen(2, "w", 1, closefd=False, errors="replace")


def flush_stdout() -> None:
    """Write what is left; OSError if it is lost."""
    sys.stdout.flush()


def silence_stdout() -> None:
    """Let go what could not be written: the interpreter would try it again as it ends."""
    _put_null(1, os.O_WRONLY)


def _put_null(fd: int, mode: int) -> None:
    null = os.open(os.devnull, mode)
    if null != fd:
        os.dup2(null, fd, inheritable=False)
        os.close(null)
