# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of pages as runs of neighbours: bit i of a number is page i."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

__all__ = ["count_pages", "page_bitmap", "page_runs", "split_runs"]

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
