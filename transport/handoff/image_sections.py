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

from cowshed.accounting.page_runs import PackedRuns

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
_WHOSE: Final = struct.Struct("<II")

Runs = Sequence[tuple[int, int]]

RUN_BYTES: Final = 12
WHOSE_BYTES: Final = _WHOSE.size


@dataclass(frozen=True)
class ImageBytes:
    """Pages of an image: runs of (first page, number of pages), and their bytes."""

    image: int
    runs: Runs
    content: bytes | memoryview


@dataclass(frozen=True)
class ImageWhole:
    """The end of an image's bytes: all its pages that are not zeros came."""

    image: int


def encode_runs(whose: int, runs: Runs) -> bytes:
    """Encode the number of an image or a guest, and runs of its pages."""
    return _WHOSE.pack(whose, len(runs)) + PackedRuns.of(runs).raw


def decode_runs(payload: bytes | memoryview) -> tuple[int, PackedRuns, int]:
    """Return the number of the image or guest, the runs, and how many bytes both took.

    Raises ValueError or struct.error for a malformed payload.
    """
    whose, nr = _WHOSE.unpack_from(payload)
    end = _WHOSE.size + nr * RUN_BYTES
    if end > len(payload):
        raise ValueError(f"{len(payload)} bytes for {nr} runs")
    return whose, PackedRuns(bytes(payload[_WHOSE.size : end])), end


def check_runs(runs: Runs, size_bytes: int, content: bytes | memoryview | None) -> None:
    """Raise ValueError unless runs ascend within an image and the content, if any, fits them."""
    total = PackedRuns.of(runs).check(-(-size_bytes // PAGE_BYTES))
    if content is not None and len(content) != total * PAGE_BYTES:
        raise ValueError(f"{len(content)} bytes for {total} pages")
