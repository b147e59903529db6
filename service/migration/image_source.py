# SPDX-License-Identifier: Apache-2.0
"""The source's side of images' bytes: reads hot extents first, leaves out zeros and holes.

Reads the image's source, not its frames: an extent may be evicted at any time, and reading the
source loads nothing into the store. Memory is bounded by one section.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Final

from cowshed.cache import Image, SourceError
from cowshed.service.images.digests import digest_of
from cowshed.transport.handoff.sections import MAX_PAGES, PAGE_BYTES, ImageBytes

__all__ = ["bytes_to_send", "check_source", "image_sections"]

_MAX_BYTES: Final = MAX_PAGES * PAGE_BYTES
_ZEROS: Final = bytes(_MAX_BYTES)
_ZERO_PAGE: Final = bytes(PAGE_BYTES)


def check_source(image: Image) -> None:
    """Raise SourceError if an image's source changed since its digest was computed.

    If its mtime changed, this reads the whole source to compare the digest.
    """
    try:
        changed = image.source_change or image.source.changed()
        if changed is None and image.source.written_ns() != image.source.identity.mtime_ns:
            changed = image.content_change(digest_of)
    except OSError as error:
        raise SourceError(f"cannot read image {image.label!r}: {error.strerror}") from error
    if changed is not None:
        raise SourceError(
            f"the source of image {image.label!r} changed while it was served ({changed}): its "
            "bytes cannot be sent; serve the image at the target"
        )


def bytes_to_send(image: Image) -> int:
    """Return how many bytes of an image's source are not holes. Raises SourceError."""
    fd = image.source.reopen()
    try:
        return sum(end - start for start, end in _data(fd, image.size_bytes))
    finally:
        os.close(fd)


def image_sections(
    no: int, image: Image, hot: Iterable[int], kept: bytearray | None = None
) -> Iterator[tuple[int, ImageBytes | None]]:
    """Yield (bytes covered, section) for an image's bytes, hot extents first.

    kept has a bit for each page that the other end has; these are skipped. The section is None if
    nothing is left to send of its bytes. Raises SourceError.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    # O_DIRECT, so that the bytes do not take room in the page cache, too.
    direct = image.source.direct_fd >= 0
    fd = os.open(f"/proc/self/fd/{image.source.fd}", flags | (os.O_DIRECT if direct else 0))
    try:
        data = bytearray(-(-image.nr_extents // 8))
        for start, end in _data(fd, image.size_bytes):
            last = (end - 1) // image.extent_bytes
            for extent in range(start // image.extent_bytes, last + 1):
                data[extent // 8] |= 1 << extent % 8
        with mmap.mmap(-1, _MAX_BYTES) as buffer, memoryview(buffer) as view:  # aligned
            for extents in _batches(image, hot, data):
                yield _section(no, image, fd, view, extents, kept)
    finally:
        os.close(fd)


def _batches(image: Image, hot: Iterable[int], data: bytearray) -> Iterator[list[int]]:
    """Yield the extents with data, hot ones first, in lists of as many as fit a section."""
    most = max(1, MAX_PAGES // image.extent_pages)
    batch: list[int] = []
    hottest = (extent for extent in hot if extent < image.nr_extents)
    for extents in (hottest, range(image.nr_extents)):
        for extent in extents:
            if data[extent // 8] & 1 << extent % 8:
                data[extent // 8] ^= 1 << extent % 8
                batch.append(extent)
                if len(batch) == most:
                    yield sorted(batch)
                    batch = []
        if batch:
            yield sorted(batch)
            batch = []


def _section(
    no: int, image: Image, fd: int, view: memoryview, extents: list[int], kept: bytearray | None
) -> tuple[int, ImageBytes | None]:
    runs: list[tuple[int, int]] = []
    content: list[bytes] = []
    nr_bytes = 0
    for start, end in _neighbours(image, extents):
        whole = -(-(end - start) // PAGE_BYTES) * PAGE_BYTES
        raw = _read(image, fd, view[:whole], start, end - start)
        nr_bytes += len(raw)
        if raw == _ZEROS[: len(raw)]:
            continue
        raw += bytes(whole - len(raw))
        for at in range(0, len(raw), PAGE_BYTES):
            page = (start + at) // PAGE_BYTES
            bytes_of_page = raw[at : at + PAGE_BYTES]
            if bytes_of_page == _ZERO_PAGE or _has(kept, page):
                continue
            if runs and sum(runs[-1]) == page:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((page, 1))
            content.append(bytes_of_page)
    return nr_bytes, ImageBytes(no, tuple(runs), b"".join(content)) if runs else None


def _has(bitmap: bytearray | None, page: int) -> bool:
    return bitmap is not None and bool(bitmap[page // 8] >> page % 8 & 1)


def _neighbours(image: Image, extents: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the extents' ranges in the source, adjacent ones merged; (start, end) in bytes."""
    place: tuple[int, int] | None = None
    for extent in extents:
        start = extent * image.extent_bytes
        end = min(start + image.extent_bytes, image.size_bytes)
        if place is not None and place[1] == start:
            place = place[0], end
            continue
        if place is not None:
            yield place
        place = start, end
    if place is not None:
        yield place


def _read(image: Image, fd: int, view: memoryview, offset: int, nr_bytes: int) -> bytes:
    """Read a part of the source; the view must be of whole pages, as O_DIRECT requires."""
    at = 0
    try:
        while at < nr_bytes:
            before, at = at, at + os.preadv(fd, [view[at:]], offset + at)
            if at < nr_bytes:
                at -= at % PAGE_BYTES
                if at == before:
                    raise SourceError(
                        f"source of image {image.label!r} ends before byte {offset + nr_bytes}: "
                        "it was truncated while it was served"
                    )
    except OSError as error:
        raise SourceError(f"cannot read image {image.label!r}: {error.strerror}") from error
    return bytes(view[:nr_bytes])


def _data(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file that are not holes, as far as its file system knows."""
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            start, end = at, size_bytes  # for example, a device
        if start >= size_bytes:
            return
        yield start, min(end, size_bytes)
        at = end
