# SPDX-License-Identifier: Apache-2.0
"""The configuration's text, read once and passed on to the daemon's later processes.

The file may be a pipe, on a hung disk, or wrong by the time that a keeper must be started. So a
process gets the text in a memfd, whose number is in its environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["CONFIG_FD", "config_text_make", "config_text_read"]

CONFIG_FD: Final = "COWSHED_CONFIG_FD"


def config_text_make(text: str) -> int:
    """Return a memfd with a text, which the caller owns; exec closes it unless it is passed on."""
    fd = os.memfd_create("cowshed-config", os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    return fd


def config_text_read(path: Path) -> str:
    """Return the text passed to this process, at the first call; else the file's.

    Raises OSError, and ValueError if the text is not UTF-8.
    """
    given = os.environ.pop(CONFIG_FD, "")
    if not given:
        return path.read_text(encoding="utf-8")
    fd = int(given)
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()
    finally:
        os.close(fd)
