# SPDX-License-Identifier: Apache-2.0
"""The demo's temporary folders."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from demo_stage import DemoError

from cowshed.service.runtime.sizes import format_bytes

__all__ = ["open_to_all", "roomy", "temporary_folder"]

_BUILD: Final = Path(__file__).resolve().parent.parent / "build"
# The longest path of a run-dir's folder with which a socket's path fits (unix(7)).
_MAX_FOLDER_CHARACTERS: Final = 70


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in parent; it is removed with its contents when the block ends."""
    with tempfile.TemporaryDirectory(
        prefix="cowshed-demo-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def roomy(needed_bytes: int) -> Path:
    """Return a folder with that much free space; the one for temporary files if it has it."""
    _BUILD.mkdir(exist_ok=True)
    folders = [Path(tempfile.gettempdir()), _BUILD, Path("/var/tmp")]
    for folder in folders:
        if folder.is_dir() and shutil.disk_usage(folder).free > needed_bytes:
            return folder
    names = ", ".join(map(str, folders))
    raise DemoError(
        f"no room for {format_bytes(needed_bytes)} in {names}: make room, name another folder "
        "in TMPDIR, or give a smaller --size"
    )


def open_to_all() -> Path:
    """Return a folder that other users can enter, where a socket's path is short enough."""
    for folder in (Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/run")):
        enterable = all(part.stat().st_mode & 0o001 for part in (folder, *folder.parents))
        if enterable and len(str(folder)) <= _MAX_FOLDER_CHARACTERS:
            return folder
    raise DemoError("no folder for the socket that other users can enter: set TMPDIR to one")
