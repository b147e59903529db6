# SPDX-License-Identifier: Apache-2.0
"""Two mappings of an image with one interface: as a guest, and by a plain mmap."""

from __future__ import annotations

import itertools
import mmap
import os
from array import array
from pathlib import Path
from random import Random
from typing import Any

from native import ffi

from cowshed.transport import Disk, connect

__all__ = ["PAGE_BYTES", "GuestMapping", "PlainMapping", "page_order", "smaps_of"]

PAGE_BYTES = 4096
_numbers = itertools.count(1)


def page_order(nr_pages: int, order: str, seed: int) -> array[int]:
    """Return page numbers to touch, each at most once.

    "sequential" and "shuffled" are all pages; "subset" is an eighth of them, picked and shuffled.
    """
    if order == "sequential":
        return array("I", range(nr_pages))
    if order == "shuffled":
        pages = list(range(nr_pages))
        Random(seed).shuffle(pages)
        return array("I", pages)
    assert order == "subset", order
    return array("I", Random(seed).sample(range(nr_pages), nr_pages // 8))


def smaps_of(pid: int, address: int) -> dict[str, int]:
    """Return the byte counts of one mapping (Rss, Pss, Private_Dirty, ...) from /proc/PID/smaps.

    The mapping may be several VMAs; the counts of those up to the first other mapping are added.
    """
    sums: dict[str, int] = {}
    inside = False
    inode = None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            start = int(head.split("-")[0], 16)
            inside = start == address or (inside and rest[3] == inode)
            inode = rest[3]
        elif inside and rest and rest[-1] == "kB":
            sums[head.rstrip(":")] = sums.get(head.rstrip(":"), 0) + int(rest[0]) * 1024
    return sums


class GuestMapping:
    """An image opened by the guest library; windows are adaptive unless window_bytes is given."""

    def __init__(self, uri: str, image: str, window_bytes: int | None = None) -> None:
        self.name = f"bench-{os.getpid()}-{next(_numbers)}"
        with connect(uri) as backend:
            self.disk: Disk = backend.open(image, guest=self.name, window_bytes=window_bytes)
        self.nr_bytes = self.disk.size_bytes
        self._view = self.disk.view
        self.base = ffi.from_buffer("char[]", self._view, require_writable=True)

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return int(ffi.cast("uintptr_t", self.base))

    def close(self) -> None:
        """Detach."""
        ffi.release(self.base)
        self._view.release()
        del self._view
        self.disk.close()


class PlainMapping:
    """A file mapped MAP_PRIVATE, readable and writable."""

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            self.nr_bytes = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(
                file.fileno(),
                self.nr_bytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self.base: Any = ffi.from_buffer("char[]", self._map, require_writable=True)

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return int(ffi.cast("uintptr_t", self.base))

    def close(self) -> None:
        """Unmap."""
        ffi.release(self.base)
        self._map.close()
