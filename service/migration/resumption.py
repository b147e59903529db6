# SPDX-License-Identifier: Apache-2.0
"""Going on with an export that broke off: what its file holds that is good, and what still counts.

Guests write on between the two exports, and nobody follows their writes meanwhile. So the pages in
the file are compared with what the guests have now, by a digest of each, and only others are
written behind them: PAGES take the place of earlier ones. What the file says of guests and images
cannot be changed behind it: if it is not so any more there is nothing to go on with.
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
    """Give what two pages have in common only if they are the same."""
    return hashlib.blake2b(page, digest_size=16).digest()


@dataclass
class Prefix:
    """What is good of a file, and where it ends. Lists are by the numbers of images and guests.

    pages are the digests of guests' pages, image_pages the pages that came of images, a bit for
    each. About 120 bytes for each private page.
    """

    mark: Mark
    images: list[ImageSection]
    guests: list[GuestSection]
    pages: list[dict[int, bytes]]
    image_pages: list[bytearray]
    whole: set[int]
    working_sets: set[int] = field(default_factory=set)

    def find_images(self, served: Sequence[Image]) -> list[Image]:
        """Give the images that the file's are; UsageError if one is not served any more."""
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
        raise _stale(f"image {section.name!r} is not served as it was")

    def find_guests(self, there: Sequence[MigratingGuest]) -> list[MigratingGuest]:
        """Give the guests that the file's are; UsageError if they are not the same as then."""
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
            raise _stale(f"guest {next(iter(by_key))[1]!r} came")
        return found


def _stale(what: str) -> UsageError:
    return UsageError(f"{what} since the export broke off; export anew, without --resume")


def read_prefix(fd: int, look: Callable[[], None]) -> Prefix | None:
    """Read what a file holds, up to its end, to damage, or to guests' totals, which must come last.

    None if so little is there that nothing is lost by beginning anew. The file is left as it is.
    Raises UsageError for a whole one, and for what is no export.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise UsageError("only an export to a file can be gone on with; begin it anew")
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
            raise UsageError(f"it is no export that broke off: {error}") from error
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror}") from error
    return scan.result()


class _Scan:
    """Collects what a reader gives, up to guests' totals."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader
        self._mark: Mark | None = None
        self._pages: dict[int, dict[int, bytes]] = {}
        self._image_pages: dict[int, bytearray] = {}
        self._working_sets: set[int] = set()
        self._whole: set[int] = set()
        self._is_complete = False  # all images and guests have come

    def take(self, section: Section) -> None:
        """Take a section in. UsageError for the last one of a file: it is whole."""
        if isinstance(section, End):
            raise UsageError("the file is whole: there is nothing to go on with")
        if self._mark is not None or isinstance(section, Header | ImageSection | GuestSection):
            return
        self._is_complete = True
        if isinstance(section, Totals):
            self._mark = self._reader.mark()  # this, and all behind it, is written again
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
        """Give what was collected; None if it ends before anything but who and what there is."""
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
