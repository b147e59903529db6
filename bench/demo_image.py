# SPDX-License-Identifier: Apache-2.0
"""An ext4 image filled from files of this machine, without root rights or a mount.

Files are hard-linked (or, across file systems, copied) into a tree, of which `mke2fs -d` makes the
image: files of middling size, from the roots, in the order of their names, until the image is
nearly full. So the same machine gives the same files.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo_stage import DemoError

__all__ = ["MadeImage", "fill_tree", "make_image"]

_ROOTS: Final = ("/usr/bin", "/usr/lib", "/usr/share", "/usr/local", "/opt")
_MIN_FILE_BYTES: Final = 8 << 10
_BLOCK_BYTES: Final = 4096
# Room for ext4's group descriptors, bitmaps, inodes and directories; the rest is free space: zeros.
_OVERHEAD_SHARE: Final = 1 / 16
_PATHS: Final = "/usr/sbin:/sbin:/usr/local/sbin"


@dataclass(frozen=True)
class MadeImage:
    """An image file and its contents."""

    path: Path
    size_bytes: int
    nr_files: int
    content_bytes: int


def make_image(
    folder: Path, size_bytes: int, on_progress: Callable[[int], None] = lambda _: None
) -> MadeImage:
    """Make folder/demo.ext4 of exactly size_bytes; on_progress gets the bytes chosen so far.

    folder needs size_bytes of free space, twice that if it is on another file system than /usr.
    Files made beside the image are removed. Raises DemoError.
    """
    mke2fs = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:{_PATHS}")
    if mke2fs is None:
        raise DemoError("mke2fs is not installed: install e2fsprogs")
    tree = folder / "tree"
    # Closed to other users: they must not reach an old version of a program by a hard link.
    tree.mkdir(mode=0o700)
    try:
        nr_files, content_bytes = fill_tree(tree, size_bytes, on_progress)
        path = folder / "demo.ext4"
        with path.open("wb") as file:
            file.truncate(size_bytes)
        options = ["-q", "-F", "-t", "ext4", "-m", "0", "-b", str(_BLOCK_BYTES)]
        features = ["-O", "^has_journal", "-N", str(2 * nr_files + 1024)]
        done = subprocess.run(
            [mke2fs, *options, *features, "-d", str(tree), str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            process_group=0,
        )
        if done.returncode:
            raise DemoError(f"mke2fs failed: {' '.join(done.stderr.split()) or done.returncode}")
    except OSError as error:
        raise DemoError(f"cannot make an image in {folder}: {error}") from error
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return MadeImage(path, size_bytes, nr_files, content_bytes)


def fill_tree(tree: Path, size_bytes: int, on_progress: Callable[[int], None]) -> tuple[int, int]:
    """Put files into the tree until the image would be full; return their number and bytes."""
    wanted_bytes = int(size_bytes * (1 - _OVERHEAD_SHARE))
    taken_bytes = nr_files = 0
    for path, file_bytes in _candidates(max_file_bytes=size_bytes // 16):
        used_bytes = -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        if taken_bytes + used_bytes > wanted_bytes:
            continue
        inside = tree / path.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, inside)
        except OSError:
            try:
                shutil.copyfile(path, inside)
            except PermissionError:
                continue
        taken_bytes += used_bytes
        nr_files += 1
        on_progress(taken_bytes)
        if wanted_bytes - taken_bytes < _MIN_FILE_BYTES:
            break
    return nr_files, taken_bytes


def _candidates(max_file_bytes: int) -> Iterator[tuple[Path, int]]:
    """Yield the roots' world-readable regular files, each inode once, with their sizes."""
    seen: set[tuple[int, int]] = set()
    for root in _ROOTS:
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                mode, inode = status.st_mode, (status.st_dev, status.st_ino)
                special = mode & (stat.S_ISUID | stat.S_ISGID) or not mode & stat.S_IROTH
                if not stat.S_ISREG(mode) or special or inode in seen:
                    continue
                if _MIN_FILE_BYTES <= status.st_size <= max_file_bytes:
                    seen.add(inode)
                    yield path, status.st_size
