# SPDX-License-Identifier: Apache-2.0
"""The configuration's text, read once: later processes of a daemon are given it, and read no file.

A file may be on a disk that hangs, be a pipe, or be wrong by the time that a keeper has to be
started. A process is given the text in a memfd, whose number its environment has.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["CONFIG_FD", "config_text_make", "config_text_read"]

CONFIG_FD: Final = "COWSHED_CONFIG_FD"


def config_text_make(text: str) -> int:
    """Give a memfd that has a text; the caller's, and closed by exec unless passed on."""
    fd = os.memfd_create("cowshed-config", os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    return fd


def config_text_read(path: Path) -> str:
    """The text that this process was given, once; else that of the file. OSError, ValueError."""
    given = os.environ.pop(CONFIG_FD, "")
    if not given:
        return path.read_text(encoding="utf-8")
    fd = int(given)
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0).decode()
    finally:
        os.close(fd)
