# SPDX-License-Identifier: Apache-2.0
"""Disk images of three kinds of file system, made from a folder without root rights or a mount."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from guest_kernel import VmError
from initramfs import INIT, SYSTEM_FOLDERS, applets, find_program

__all__ = ["MOUNT_OPTIONS", "add_system", "make_disk", "make_files", "sums_of"]

MIB: Final = 1 << 20
# A guest's persistent memory is of whole blocks of this size.
_ALIGN_BYTES: Final = 2 * MIB
# What a guest gives mount(8) with each: without a page cache of its own where that can be had.
MOUNT_OPTIONS: Final = {"ext4": "ro,dax=always", "erofs": "ro,dax=always", "squashfs": "ro"}


def make_files(folder: Path, total_bytes: int, rng: random.Random) -> None:
    """Fill folder with files of many sizes, small and odd ones too; half of the bytes repeat."""
    left = total_bytes
    number = 0
    while left > 0:
        size_bytes = min(left, rng.choice((100, 4096, 20_000, 100_000, MIB, 3 * MIB)))
        parent = folder / f"d{number % 7}"
        parent.mkdir(parents=True, exist_ok=True)
        half = rng.randbytes(-(-size_bytes // 2))
        (parent / f"f{number}").write_bytes((half + half)[:size_bytes])
        left -= size_bytes
        number += 1


def add_system(folder: Path) -> None:
    """Put into folder what a machine needs to have it as its root (Machine's root)."""
    for name in SYSTEM_FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    busybox = find_program("busybox")
    shutil.copy(busybox, folder / "bin/busybox")
    for applet in applets(busybox):
        if applet != "busybox":
            (folder / "bin" / applet).symlink_to("busybox")
    shutil.copy(INIT, folder / "init")
    (folder / "init").chmod(0o755)


def sums_of(folder: Path) -> str:
    """Give what `sums` prints in a guest that has this folder mounted (guest_init.sh)."""
    names = sorted(
        (f"./{path.relative_to(folder)}" for path in _regular_files(folder)), key=os.fsencode
    )
    return "".join(
        f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    )


def make_disk(kind: str, folder: Path, path: Path, free_bytes: int = 0) -> Path:
    """Make path a file system of that kind with the folder's files, in whole 2 MiB.

    free_bytes is room for more, where the kind can be written to (ext4). Raises VmError.
    """
    content_bytes = sum(-(-path.stat().st_size // 4096) * 4096 for path in _regular_files(folder))
    if kind == "ext4":
        # A sixteenth, and a little, for what ext4 itself needs.
        size_bytes = content_bytes * 17 // 16 + 2 * MIB + free_bytes
        size_bytes = -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        with path.open("wb") as file:
            file.truncate(size_bytes)
        # No lazy initialisation: an idle machine shall not write.
        features = ["-O", "^has_journal", "-E", "lazy_itable_init=0,root_owner=0:0"]
        _run(
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            *features,
            "-d",
            folder,
            path,
        )
    elif kind == "erofs":
        _run("mkfs.erofs", "--quiet", path, folder)
    else:
        assert kind == "squashfs", kind
        _run("mksquashfs", folder, path, "-quiet", "-no-progress", "-noappend", "-all-root")
    size_bytes = path.stat().st_size
    os.truncate(path, -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES)
    return path


def _regular_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _run(program: str, *words: str | Path) -> None:
    command = [str(find_program(program)), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VmError(f"{program} failed: {' '.join(done.stderr.split()) or done.returncode}")
