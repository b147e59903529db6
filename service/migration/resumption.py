# SPDX-License-Identifier: Apache-2.0
"""Resume an interrupted export: read the valid part of its file, and check that it still applies.

Guests keep writing between the two exports, and their writes are not tracked meanwhile. So each
page in the file is compared with the guest's page now, by digest, and pages that differ are
appended: a later PAGES section replaces earlier ones. The descriptions of guests and images at the
front cannot be changed: if one no longer applies, the export cannot be resumed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cowshed.cache import Image, SourceError, UsageError
from cowshed.service.migration.migrating import MigratingGuest
from cowshed.transport.handoff.frames import DamagedError, Mark
from cowshed.transport.handoff.sections import (
    PAGE_BYTES,
    Dropped,
    End,
    GuestSection,
    Header,
    ImageBytes,
    ImageSection,
    ImageWhole,
    Pages,
    Section,
    StateReader,
    Totals,
    WorkingSetSection,
)

__all__ = ["Prefix", "page_digest", "read_prefix"]

_READ_BYTES: Final = 1 << 20


def page_digest(page: bytes | memoryview) -> bytes:
    """Return a digest by which equal pages are recognized."""
    return hashlib.blake2b(page, digest_size=16).digest()


@dataclass
class Prefix:
    """The valid part of a file, and where it ends. Lists are by the numbers of images and guests.

    pages are the digests of guests' pages, image_pages bitmaps of the images' pages in the file.
    Takes about 120 bytes for each private page.
    """

    mark: Mark
    images: list[ImageSection]
    guests: list[GuestSection]
    pages: list[dict[int, bytes]]
    image_pages: list[bytearray]
    whole: set[int]
    working_sets: set[int] = field(default_factory=set)

    def find_images(self, served: Sequence[Image]) -> list[Image]:
        """Return the served images of the file; UsageError if one is no longer served."""
        return [self._find_image(section, served) for section in self.images]

    @staticmethod
    def _find_image(section: ImageSection, served: Sequence[Image]) -> Image:
        for image in served:
            if (image.name, image.domain, image.size_bytes, image.extent_bytes, image.digest) == (
                section.name,
                section.domain,
                section.size_bytes,
                section.extent_bytes,
                section.digest,
            ):
                return image
        raise _stale(f"image {section.name!r} is no longer served or has changed")

    def find_guests(self, there: Sequence[MigratingGuest]) -> list[MigratingGuest]:
        """Return the guests of the file; UsageError if they are not the same as then."""
        by_key = {(each.image.domain, each.name): each for each in there}
        found = []
        for section in self.guests:
            each = by_key.pop((self.images[section.image].domain, section.name), None)
            if each is None:
                raise _stale(f"guest {section.name!r} is gone")
            each.keep_token(section.token)
            now = each.section(section.image)
            label = self.images[section.image].name
            same = replace(now, transport=section.transport, counters=section.counters)
            if each.image.name != label or same != section:
                raise _stale(f"guest {section.name!r} has another quota, owner or image")
            found.append(each)
        if by_key:
            raise _stale(f"guest {next(iter(by_key))[1]!r} attached")
        return found


def _stale(what: str) -> UsageError:
    return UsageError(f"{what} since the export was interrupted; export anew, without --resume")


def read_prefix(fd: int, look: Callable[[], None]) -> Prefix | None:
    """Read a file up to its end, to damage, or to guests' totals, which must be written last.

    Returns None if the file has no pages yet, so that the export may as well begin anew. Does not
    change the file. Raises UsageError for a complete file, and for one that is not an export.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise UsageError("only an export to a file can be resumed; begin it anew")
    reader = StateReader()
    scan = _Scan(reader)
    offset = 0
    try:
        while raw := os.pread(fd, _READ_BYTES, offset):
            offset += len(raw)
            look()
            for section in reader.feed(raw):
                scan.take(section)
    except DamagedError as error:
        if reader.mark().offset == 0:
            raise UsageError(f"the file is not an interrupted export: {error}") from error
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror}") from error
    return scan.result()


class _Scan:
    """Collects a reader's sections, up to guests' totals."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader
        self._mark: Mark | None = None
        self._pages: dict[int, dict[int, bytes]] = {}
        self._image_pages: dict[int, bytearray] = {}
        self._working_sets: set[int] = set()
        self._whole: set[int] = set()
        self._is_complete = False  # all images and guests were read

    def take(self, section: Section) -> None:
        """Collect a section. UsageError for the last one of a file, which is then complete."""
        if isinstance(section, End):
            raise UsageError("the file is complete: there is nothing to resume")
        if self._mark is not None or isinstance(section, Header | ImageSection | GuestSection):
            return
        self._is_complete = True
        if isinstance(section, Totals):
            self._mark = self._reader.mark()  # this and all after it is written again
        elif isinstance(section, Pages):
            self._take_pages(section)
        elif isinstance(section, Dropped):
            known = self._pages.get(section.guest, {})
            for first, nr in section.runs:
                for page in range(first, first + nr):
                    known.pop(page, None)
        elif isinstance(section, ImageBytes):
            bitmap = self._bitmap(section.image)
            for first, nr in section.runs:
                for page in range(first, first + nr):
                    bitmap[page // 8] |= 1 << page % 8
        elif isinstance(section, ImageWhole):
            self._whole.add(section.image)
        elif isinstance(section, WorkingSetSection):
            self._working_sets.add(section.image)

    def _take_pages(self, section: Pages) -> None:
        known = self._pages.setdefault(section.guest, {})
        content, at = memoryview(section.content), 0
        for first, nr in section.runs:
            for page in range(first, first + nr):
                known[page] = page_digest(content[at : at + PAGE_BYTES])
                at += PAGE_BYTES

    def _bitmap(self, image: int) -> bytearray:
        if image not in self._image_pages:
            nr_pages = -(-self._reader.images[image].size_bytes // PAGE_BYTES)
            self._image_pages[image] = bytearray(-(-nr_pages // 8))
        return self._image_pages[image]

    def result(self) -> Prefix | None:
        """Return the prefix; None if the file ends before the first section after the guests."""
        if not self._is_complete:
            return None
        reader = self._reader
        return Prefix(
            self._mark or reader.mark(),
            reader.images,
            reader.guests,
            [self._pages.get(no, {}) for no in range(len(reader.guests))],
            [self._bitmap(no) for no in range(len(reader.images))],
            self._whole,
            self._working_sets,
        )
