# SPDX-License-Identifier: Apache-2.0
"""What one guest must see of an image, when some of its writes may or may not have been done.

Pure. Every page has the bytes it may have: one candidate as a rule, more after a write that nobody
saw the end of. What is read decides between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Final

PAGE: Final = 4096
_NR_BEFORE: Final = 6


class PageModel:
    """Invariants: (1) a page that is not in _may is the image's; (2) each candidate is 4096 bytes.

    torn: pages cut short in the middle of a write may be of both candidates, byte by byte.
    """

    def __init__(self, image: bytes) -> None:
        assert len(image) % PAGE == 0
        self._image = image
        self._may: dict[int, list[bytes]] = {}
        self._torn: set[int] = set()
        # What pages were before, and until when: a page that went back says since when it is wrong.
        self._was: dict[int, deque[tuple[float, str, bytes]]] = {}

    @property
    def size_bytes(self) -> int:
        return len(self._image)

    @property
    def nr_changed(self) -> int:
        """How many pages are, or may be, other than the image's."""
        return len(self._may)

    def _of_image(self, page: int) -> bytes:
        return self._image[page * PAGE : (page + 1) * PAGE]

    def candidates(self, page: int) -> list[bytes]:
        return self._may.get(page) or [self._of_image(page)]

    def forget(self) -> None:
        """The guest's private pages are gone."""
        for page in list(self._may):
            self._note(page, "forgotten")
        self._may.clear()
        self._torn.clear()

    def write(self, offset: int, data: bytes, *, unsure: bool = False, torn: bool = False) -> None:
        """It was written, or, if unsure, it may have been; torn: in part of a page, even."""
        for page, start, at, nr in _pieces(offset, len(data)):
            piece = data[at : at + nr]
            old = self.candidates(page)
            self._note(page, "written" + " perhaps" * unsure)
            new = [was[:start] + piece + was[start + nr :] for was in old]
            self._set(page, [*old, *new] if unsure else new)
            if torn:
                self._torn.add(page)
            elif not unsure and nr == PAGE:
                self._torn.discard(page)

    def zero(self, first: int, nr_pages: int) -> None:
        """Pages were given back by who finds zeros in their place."""
        for page in range(first, first + nr_pages):
            self._note(page, "zeroed")
            self._set(page, [bytes(PAGE)])
            self._torn.discard(page)

    def discard(self, first: int, nr_pages: int, *, unsure: bool = False) -> None:
        for page in range(first, first + nr_pages):
            self._note(page, "discarded" + " perhaps" * unsure)
            if unsure:
                self._set(page, [*self.candidates(page), self._of_image(page)])
            else:
                self._may.pop(page, None)
                self._torn.discard(page)

    def _note(self, page: int, what: str) -> None:
        was = self._was.setdefault(page, deque(maxlen=_NR_BEFORE))
        was.extend((time.monotonic(), what, each) for each in self.candidates(page))

    def _history(self, page: int, start: int, piece: bytes) -> str:
        told = []
        for when, what, was in self._was.get(page, ()):
            same = " THE SAME" * (was[start : start + len(piece)] == piece)
            told.append(f"{time.monotonic() - when:.2f} s ago {what}, it was{same} {was[:4].hex()}")
        return "; ".join(told)

    def _set(self, page: int, candidates: list[bytes]) -> None:
        self._may[page] = list(dict.fromkeys(candidates))

    def wrong(self, offset: int, found: bytes) -> str:
        """What is wrong with what was read there; "" if it is as it may be, which then it is."""
        for page, start, at, nr in _pieces(offset, len(found)):
            piece = found[at : at + nr]
            may = self.candidates(page)
            fit = [each for each in may if each[start : start + nr] == piece]
            if fit:
                if len(may) > 1 and page not in self._torn:
                    self._may[page] = fit
                continue
            if page in self._torn and _is_mixed([m[start : start + nr] for m in may], piece):
                if nr == PAGE:
                    self._may[page] = [piece]
                    self._torn.discard(page)
                continue
            return (
                f"page {page} from byte {start}: {_differ(may, start, piece, self._image)}; "
                + self._history(page, start, piece)
            )
        return ""


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut at pages: page, the first byte in it, where that is in the data, how many."""
    at = 0
    while at < length:
        page, start = divmod(offset + at, PAGE)
        nr = min(PAGE - start, length - at)
        yield page, start, at, nr
        at += nr


def _is_mixed(may: list[bytes], found: bytes) -> bool:
    return all(byte in choice for byte, choice in zip(found, zip(*may, strict=True), strict=True))


def _differ(may: list[bytes], start: int, piece: bytes, image: bytes) -> str:
    right = may[-1][start : start + len(piece)]
    first = next(i for i in range(len(piece)) if piece[i] != right[i])
    nr = sum(a != b for a, b in zip(piece, right, strict=True))
    what = ""
    if not any(piece):
        what = ", all zeros"
    elif len(piece) >= 16 and (where := image.find(piece)) >= 0:
        what = f", as the image is at byte {where}"
    return (
        f"{nr} of {len(piece)} bytes wrong, the first at {first}: "
        f"{piece[first : first + 8].hex()} instead of {right[first : first + 8].hex()}{what} "
        f"({len(may)} candidates)"
    )
