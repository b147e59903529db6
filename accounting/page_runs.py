# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of pages as runs of neighbours: bit i of a number is page i."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, overload

from cowshed.cache._core import ffi, lib

__all__ = ["PackedRuns", "count_pages", "packed_runs", "page_bitmap", "page_runs", "split_runs"]

_RUN: Final = struct.Struct("<QI")

_FULL: Final = 0xFF
# A run of bytes whose bits are all set; or one byte with some set.
_NOT_EMPTY: Final = re.compile(rb"\xff+|[^\x00\xff]")


def _runs_of(byte: int) -> tuple[tuple[int, int], ...]:
    ones = [bit for bit in range(8) if byte >> bit & 1]
    firsts = [bit for bit in ones if bit - 1 not in ones]
    lasts = [bit for bit in ones if bit + 1 not in ones]
    return tuple((first, last - first + 1) for first, last in zip(firsts, lasts, strict=True))


_RUNS_OF_BYTE: Final = [_runs_of(byte) for byte in range(256)]


def count_pages(bitmap: int) -> int:
    """Count the pages of a bitmap."""
    return bitmap.bit_count()


def page_bitmap(pages: Iterable[int]) -> int:
    """Give the bitmap of some pages; O(the last one's number)."""
    raw = bytearray()
    for page in pages:
        if page // 8 >= len(raw):
            raw += bytes(max(page // 8 + 1 - len(raw), len(raw)))
        raw[page // 8] |= 1 << page % 8
    return int.from_bytes(raw, "little")


def page_runs(bitmap: int) -> Iterator[tuple[int, int]]:
    """Give runs (first page, number of pages) of a bitmap, a little-endian number; O(its length).

    Successive runs are never adjacent. Guests are frozen while this runs over large bitmaps that
    are almost empty, so a regular expression skips the empty bytes.
    """
    raw = bitmap.to_bytes((bitmap.bit_length() + 7) // 8, "little")
    start = end = 0
    for found in _NOT_EMPTY.finditer(raw):
        page = found.start() * 8
        if raw[found.start()] == _FULL:
            runs: Sequence[tuple[int, int]] = ((0, 8 * (found.end() - found.start())),)
        else:
            runs = _RUNS_OF_BYTE[raw[found.start()]]
        for at, nr in runs:
            if page + at != end or start == end:
                if start != end:
                    yield start, end - start
                start = page + at
            end = page + at + nr
    if start != end:
        yield start, end - start


class PackedRuns(Sequence[tuple[int, int]]):
    """Runs as a handoff sends them, 12 bytes each: a sequence of (first page, number of pages).

    The core's calls take raw as it is; nothing is made of a run unless it is looked at.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        assert len(raw) % _RUN.size == 0
        self.raw: Final = raw

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]]) -> PackedRuns:
        """Pack runs, unless they are packed."""
        if isinstance(runs, PackedRuns):
            return runs
        return cls(b"".join(_RUN.pack(*run) for run in runs))

    def check(self, nr_pages: int) -> int:
        """Return how many pages they have.

        ValueError unless they ascend, none is empty, and all are within nr_pages pages.
        """
        total: int = lib.page_runs_check(ffi.from_buffer(self.raw), len(self), nr_pages)
        if total < 0:
            raise ValueError(f"runs of pages are out of order or outside the image of {nr_pages}")
        return total

    def __len__(self) -> int:
        return len(self.raw) // _RUN.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return _RUN.iter_unpack(self.raw)

    @overload
    def __getitem__(self, no: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, no: slice) -> Sequence[tuple[int, int]]: ...
    def __getitem__(self, no: int | slice) -> tuple[int, int] | Sequence[tuple[int, int]]:
        return tuple(self)[no]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, Sequence) else other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def packed_runs(bitmap: int, max_pages: int) -> Iterator[PackedRuns]:
    """Give the runs as split_runs() does, packed; for bitmaps with many of them."""
    nr_words = (bitmap.bit_length() + 63) // 64
    words = bitmap.to_bytes(8 * nr_words, "little")
    cdata = ffi.from_buffer("uint64_t[]", words)
    room = bytearray(max_pages * _RUN.size)
    next_page = ffi.new("uint64_t *")
    while nr := lib.page_runs_make(
        cdata, nr_words, next_page[0], max_pages, ffi.from_buffer(room), next_page
    ):
        yield PackedRuns(bytes(memoryview(room)[: nr * _RUN.size]))


def split_runs(bitmap: int, max_pages: int) -> Iterator[list[tuple[int, int]]]:
    """Give the runs in batches of at most max_pages pages each."""
    batch: list[tuple[int, int]] = []
    left = max_pages
    for first, nr in page_runs(bitmap):
        while nr:
            now = min(nr, left)
            batch.append((first, now))
            first, nr, left = first + now, nr - now, left - now
            if not left:
                yield batch
                batch, left = [], max_pages
    if batch:
        yield batch
