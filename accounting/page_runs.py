# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of pages as runs of neighbours: bit i of a number is page i."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

__all__ = ["count_pages", "page_bitmap", "page_runs", "split_runs"]

_WORD = struct.Struct("<Q")


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

    Neighbouring runs are never adjacent.
    """
    raw = bitmap.to_bytes((bitmap.bit_length() + 63) // 64 * 8, "little")
    start = -1
    for no, (word,) in enumerate(_WORD.iter_unpack(raw)):
        if word in (0, (1 << 64) - 1):  # most are
            if start >= 0 and not word:
                yield start, no * 64 - start
                start = -1
            elif start < 0 and word:
                start = no * 64
            continue
        at = 0
        while at < 64:
            rest = word >> at
            if start < 0:
                if not rest:
                    break
                at += (rest & -rest).bit_length() - 1
                start = no * 64 + at
            else:
                nr_ones = (~rest & (rest + 1)).bit_length() - 1
                at += nr_ones
                if at < 64:
                    yield start, no * 64 + at - start
                    start = -1
    if start >= 0:
        yield start, len(raw) * 8 - start


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
