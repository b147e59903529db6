# SPDX-License-Identifier: Apache-2.0
"""Sections with the bytes of images, for a target that has no source of its own.

An IMAGE with has_bytes may be followed by IMAGE_BYTES, hottest extents first, and one IMAGE_WHOLE.
Pages in none of them, and the part of the last page past the image's end, are zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "PAGE_BYTES",
    "ImageBytes",
    "ImageWhole",
    "Runs",
    "check_runs",
    "decode_runs",
    "encode_runs",
]

PAGE_BYTES: Final = 4096
_RUN: Final = struct.Struct("<QI")
_WHOSE: Final = struct.Struct("<II")

Runs = tuple[tuple[int, int], ...]

RUN_BYTES: Final = _RUN.size
WHOSE_BYTES: Final = _WHOSE.size


@dataclass(frozen=True)
class ImageBytes:
    """Pages of an image: runs of (first page, number of pages), and their bytes."""

    image: int
    runs: Runs
    content: bytes


@dataclass(frozen=True)
class ImageWhole:
    """The end of an image's bytes: all its pages that are not zeros came."""

    image: int


def encode_runs(whose: int, runs: Sequence[tuple[int, int]]) -> bytes:
    """Encode the number of an image or a guest, and runs of its pages."""
    return _WHOSE.pack(whose, len(runs)) + b"".join(_RUN.pack(*run) for run in runs)


def decode_runs(payload: bytes) -> tuple[int, Runs, int]:
    """Return the number of the image or guest, the runs, and how many bytes both took.

    Raises ValueError or struct.error for a malformed payload.
    """
    whose, nr = _WHOSE.unpack_from(payload)
    end = _WHOSE.size + nr * _RUN.size
    if end > len(payload):
        raise ValueError(f"{len(payload)} bytes for {nr} runs")
    return whose, tuple(_RUN.iter_unpack(payload[_WHOSE.size : end])), end


def check_runs(runs: Runs, size_bytes: int, content: bytes | None) -> None:
    """Raise ValueError unless runs ascend within an image and the content, if any, fits them."""
    nr_pages = -(-size_bytes // PAGE_BYTES)
    end = total = 0
    for first, nr in runs:
        if first < end or nr == 0 or first + nr > nr_pages:
            raise ValueError(f"{nr} pages from {first} are out of order or outside the image")
        end, total = first + nr, total + nr
    if content is not None and len(content) != total * PAGE_BYTES:
        raise ValueError(f"{len(content)} bytes for {total} pages")
