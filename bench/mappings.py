# SPDX-License-Identifier: Apache-2.0
"""Two mappings of an image with one interface: as a guest, and by a plain mmap."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from array import array
from pathlib import Path
from random import Random
from typing import Any

from native import ffi

from cowshed.transport import Disk, connect

__all__ = [
    "PAGE_BYTES",
    "GuestMapping",
    "HugeMapping",
    "PlainMapping",
    "page_order",
    "smaps_of",
]

PAGE_BYTES = 4096
REGION_BYTES = 2 << 20
OPEN_SECONDS = 10
POLL_SECONDS = 0.002
MADV_COLLAPSE = 25
MAP_FIXED = 0x10
_OFFSET = ctypes.c_long
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
    """An image opened by the guest library; windows are adaptive unless window_bytes is given.

    With wait_open all whole regions of the image, which must be pinned, are open at once.
    """

    def __init__(
        self,
        uri: str,
        image: str,
        window_bytes: int | None = None,
        *,
        wait_open: bool = False,
    ) -> None:
        self._uri = uri
        self.name = f"bench-{os.getpid()}-{next(_numbers)}"
        with connect(uri) as backend:
            self.disk: Disk = backend.open(image, guest=self.name, window_bytes=window_bytes)
        self.nr_bytes = self.disk.size_bytes
        self._view = self.disk.view
        self.base = ffi.from_buffer("char[]", self._view, require_writable=True)
        if wait_open:
            self.wait_open()

    def wait_open(self) -> None:
        """Wait until all whole regions are open; TimeoutError after ten seconds."""
        deadline = time.monotonic() + OPEN_SECONDS
        with connect(self._uri) as backend:
            while time.monotonic() < deadline:
                guests = backend.request("status")["status"]["guests"]
                (own,) = [guest for guest in guests if guest["name"] == self.name]
                if own["open_regions"] == self.nr_bytes // REGION_BYTES:
                    return
                time.sleep(POLL_SECONDS)
        raise TimeoutError(f"{own['open_regions']} regions of {self.name} are open, not all")

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


class HugeMapping:
    """A memfd whose frames are made huge pages, mapped MAP_PRIVATE where these can be mapped whole.

    Raises OSError where the kernel makes none.
    """

    def __init__(self, path: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, _OFFSET]
        fd = os.open(path, os.O_RDWR)
        try:
            self.nr_bytes = os.fstat(fd).st_size
            shared = self._map(fd, mmap.MAP_SHARED)
            if self._libc.madvise(_at(shared), ctypes.c_size_t(self.nr_bytes), MADV_COLLAPSE):
                raise OSError(ctypes.get_errno(), "MADV_COLLAPSE")
            self._unmap(shared)
            self.address = self._map(fd, mmap.MAP_PRIVATE)
        finally:
            os.close(fd)
        self.base: Any = ffi.cast("char *", self.address)

    def _map(self, fd: int, kind: int) -> int:
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        whole = self.nr_bytes + REGION_BYTES
        reserved = self._libc.mmap(None, whole, 0, anonymous, -1, 0)
        at = -(-reserved // REGION_BYTES) * REGION_BYTES
        if at > reserved:
            self._libc.munmap(_at(reserved), ctypes.c_size_t(at - reserved))
        end = reserved + whole
        self._libc.munmap(_at(at + self.nr_bytes), ctypes.c_size_t(end - at - self.nr_bytes))
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = self._libc.mmap(at, self.nr_bytes, prot, kind | MAP_FIXED, fd, 0)
        if mapped != at:
            raise OSError(ctypes.get_errno(), "mmap")
        return int(at)

    def _unmap(self, address: int) -> None:
        self._libc.munmap(_at(address), ctypes.c_size_t(self.nr_bytes))

    def close(self) -> None:
        """Unmap."""
        self._unmap(self.address)


def _at(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
